"""`python -m dspark_batch` is `dspark-batch`."""

import sys

from dspark_batch.cli.main import main

sys.exit(main())
