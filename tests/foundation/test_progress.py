from teal.foundation.progress import silent


def test_silent_progress_yields_every_item_in_order() -> None:
    assert list(silent([3, 1, 2], "count")) == [3, 1, 2]
