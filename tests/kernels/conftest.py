"""Every test of a kernel runs once a form."""

from __future__ import annotations

import pytest

from tests.kernels.forms import FORMS, Kernels


@pytest.fixture(scope="session", params=FORMS, ids=lambda kernels: kernels.form)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    form: Kernels = request.param
    return form
