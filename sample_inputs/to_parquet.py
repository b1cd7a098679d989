"""Write prompts.jsonl again as prompts.parquet: `python sample_inputs/to_parquet.py`."""

from pathlib import Path

import pyarrow.json
import pyarrow.parquet

here = Path(__file__).parent
pyarrow.parquet.write_table(
    pyarrow.json.read_json(here / "prompts.jsonl"), here / "prompts.parquet"
)
