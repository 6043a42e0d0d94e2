"""Studies of tiny arms: the paths, tables and claims are those of the real ones."""

import json

from cxrjax.studies.systems import run_system_study

RECIPE = """
from cxrjax.config import load_config

ARMS = {arms!r}


def get_config(arg=""):
    config = load_config("demo:32")
    arm = arg if arg in ARMS else ARMS[-1]
    config.seed = ARMS.index(arm)
    config.model.options.dropout = 0.3
    config.optimizer.schedule, config.optimizer.warmup_fraction = "constant", 0.0
    config.study.arms, config.study.passes, config.evaluate.bootstrap_resamples = ARMS, 4, 30
{more}
    return config
"""
FEW = ("train.epochs=2", "train.steps_per_epoch=2", "data.findings=('Mass','Pleural Effusion')")


class Run:
    """A study on disk and what it returned; `again()` runs it once more."""

    def __init__(self, system, names, directory, overrides, more=""):
        recipe = directory / "recipe.py"
        recipe.write_text(RECIPE.format(arms=tuple(names), more=more))
        self.directory = directory / "study"
        self.arguments = (system, f"{recipe}:{names[-1]}", overrides, self.directory)
        self.result = self.again()
        self.page = (self.directory / "report" / "index.html").read_text()

    def again(self):
        return run_system_study(*self.arguments)

    @property
    def stored(self):
        return json.loads((self.directory / "study.json").read_text())

    def claims(self):
        return {claim["statement"]: claim for claim in self.result["claims"]}
