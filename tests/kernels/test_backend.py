import pytest

from teal.kernels.backend import NotInstalled


def test_a_backend_whose_package_is_missing_says_so_and_is_never_run() -> None:
    missing = NotInstalled("numba", "numba is not installed")
    assert missing.can_run(1, 2) == "numba is not installed"
    with pytest.raises(NotImplementedError, match="numba is not installed"):
        missing.run(1, 2)
