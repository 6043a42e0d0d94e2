import pytest
from arm_samples import FEW, Run


@pytest.fixture(scope="module")
def make(tmp_path_factory, tiny_overrides):
    """`make(system, names, *overrides, more="") -> Run` on the phantom."""

    def run(system, names, *overrides, more=""):
        return Run(system, names, tmp_path_factory.mktemp(system), [*tiny_overrides, *FEW, *overrides], more)

    return run
