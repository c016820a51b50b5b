"""The table of `tood-export --timings`."""

from tood_deploy.export.result import Timings, record_timings, timed


def test_steps_are_recorded_inside_the_block_alone() -> None:
    with timed("before"):
        pass
    with record_timings() as timings:
        for step in ("graph", "verify", "graph"):
            with timed(step):
                pass
    with timed("after"):
        pass
    assert list(timings.steps) == ["graph", "verify"]
    assert all(wall > 0 and cpu >= 0 for wall, cpu in timings.steps.values())


def test_a_step_that_fails_counts() -> None:
    with record_timings() as timings:
        try:
            with timed("verify"):
                raise ValueError
        except ValueError:
            pass
    assert "verify" in timings.steps


def test_the_table_has_the_sum_and_the_shares() -> None:
    timings = Timings()
    timings.add("graph", 1.0, 2.0)
    timings.add("verify", 3.0, 6.0)
    lines = timings.text().splitlines()
    rows = {line.split("│")[1].strip(): line for line in lines if line.startswith("│")}
    assert "25%" in rows["graph"]
    assert "4.0" in rows["together"]
    assert "8.0" in rows["together"]
