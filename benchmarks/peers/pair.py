"""A copy of the bundled pair that every engine reads."""

import json
import shutil
from pathlib import Path

import mlx.core as mx

TINY = Path(__file__).parents[2] / "dspark_batch" / "tiny"


def write_pair(folder):
    """Write `target` and `drafter` into a folder, in float32, as ours is on a CPU.

    An engine that keeps the stored bfloat16 has other ids. Some read the base of the rotations at
    the top of a config only.
    """
    for name in ("target", "drafter"):
        (folder / name).mkdir()
        for file in (TINY / name).glob("*.json"):
            shutil.copy(file, folder / name)
        config = json.loads((TINY / name / "config.json").read_text())
        config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "dtype": "float32"}
        (folder / name / "config.json").write_text(json.dumps(config))
        weights = mx.load(str(TINY / name / "model.safetensors"))
        mx.save_safetensors(
            str(folder / name / "model.safetensors"),
            {key: value.astype(mx.float32) for key, value in weights.items()},
            metadata={"format": "pt"},
        )
