"""compat/ is no package of the product: its modules are found beside its command."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "compat"))

collect_ignore = ["fake_project"]
