"""A driver in a process of its own, to be killed: fake workers in a Ray that is there.

python fleet_driver.py FOLDER ADDRESS
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from engines import fake_fleet
from small_jobs import start


def main(folder, address):
    folder = Path(folder)
    opener = fake_fleet(folder, pause_s=0.05)
    return start(folder, opener=opener, ray=address, workers=2, slots=2).exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
