from pathlib import Path

import pytest
from report_samples import run_report, study_report

from cxrjax.report.content import RunReport, StudyReport
from cxrjax.report.page import write_page


@pytest.fixture(scope="session")
def study() -> StudyReport:
    return study_report()


@pytest.fixture(scope="session")
def run() -> RunReport:
    return run_report()


@pytest.fixture(scope="session")
def pages(study, run, tmp_path_factory) -> Path:
    """A folder with study.html and run.html."""
    folder = tmp_path_factory.mktemp("pages")
    write_page(study, folder / "study.html")
    write_page(run, folder / "run.html")
    return folder
