"""Classes of known segmentation data sets: their names, and the values they have in the masks.

One JSON file each, which names the repository, file, commit, sha256 and licence of its source. A
class has one name or several, of which the first is shown; `values` are its numbers in the mask
files, and pixels of the values `ignored` do not count. `evaluate/masks.py` reads them.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
SEGMENTATION_SETS = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
