"""The methods reach mergekit's registry whichever of the two is imported first."""

import subprocess
import sys

import pytest

ORDERS = [
    "import squisher_mergekit.merging.methods as own, mergekit.merge_methods as stock",
    "import mergekit.merge_methods as stock, squisher_mergekit.merging.methods as own",
    "import mergekit.plan, squisher_mergekit.merging.methods as own, mergekit.merge_methods as stock",
]


@pytest.mark.parametrize("imports", ORDERS)
def test_the_order_of_imports_does_not_matter(imports: str) -> None:
    """Both methods are registered once, and are this package's own objects."""
    names = {"squisher": "SQUISHER", "ubgm_squisher": "UBGM_SQUISHER"}
    checks = "; ".join(f"assert stock.get({name!r}) is own.{own}" for name, own in names.items())
    code = f"{imports}; {checks}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "not active" in done.stderr) == (0, False), done.stderr
