"""Write prompts.jsonl and people.jsonl again as Parquet: `python sample_inputs/to_parquet.py`."""

from pathlib import Path

import pyarrow.json
import pyarrow.parquet

here = Path(__file__).parent
for name in ("prompts", "people"):
    pyarrow.parquet.write_table(
        pyarrow.json.read_json(here / f"{name}.jsonl"), here / f"{name}.parquet"
    )
