from teal.cli.stdlib_text import HELD_OUT, calibration_text, held_out_text


def test_held_out_packages_are_not_in_the_calibration_text() -> None:
    calibration, held_out = calibration_text(), held_out_text()
    assert not set(calibration.documents) & set(held_out.documents)
    assert any("class ArgumentParser" in document for document in held_out.documents)
    assert not any("class ArgumentParser(" in document for document in calibration.documents)


def test_sources_name_the_packages() -> None:
    assert all(package in held_out_text().source for package in HELD_OUT)
