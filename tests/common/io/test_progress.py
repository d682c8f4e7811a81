import pytest

from common.io.progress import Progress


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(progress, clock, steps, *, wait=0.1, compute=0.3, first=50.0, report_every=1):
    """Plays a loop whose first step also compiles."""
    for step in steps:
        with progress.data_wait():
            clock.now += wait
        clock.now += first if step == steps[0] else compute
        progress.step_done(step)
        if step % report_every == 0:
            progress.rates(step)


def test_rates_leave_out_the_compilation():
    clock = Clock()
    progress = Progress(100, batch_size=8, num_devices=4, clock=clock)
    run(progress, clock, range(1, 11))
    rates = progress.rates(10)
    assert rates["images_per_second"] == pytest.approx(8 / 0.4)
    assert rates["images_per_second_per_device"] == pytest.approx(2 / 0.4)
    assert rates["data_wait_share"] == pytest.approx(0.25)
    assert rates["seconds_left"] == pytest.approx(90 * 0.4)


def test_rates_follow_the_recent_past():
    clock = Clock()
    progress = Progress(1000, 8, 1, window_seconds=20.0, clock=clock)
    run(progress, clock, range(1, 101))
    run(progress, clock, range(101, 201), compute=0.7, first=0.7)
    assert progress.rates(200)["images_per_second"] == pytest.approx(8 / 0.8)


def test_checkpoints_and_evaluation_do_not_slow_the_rates_but_count_for_the_time_left():
    clock = Clock()
    progress = Progress(111, 8, 1, clock=clock)
    run(progress, clock, range(1, 7))
    with progress.pause(""):
        clock.now += 10.0
    run(progress, clock, range(7, 12), first=0.3)
    rates = progress.rates(11)
    assert rates["images_per_second"] == pytest.approx(8 / 0.4)
    assert rates["seconds_left"] == pytest.approx(100 * (0.4 + 10.0 / 10))


def test_a_resumed_run_counts_only_its_own_steps():
    clock = Clock()
    progress = Progress(1000, 8, 1, clock=clock)
    run(progress, clock, range(901, 912))
    rates = progress.rates(911)
    assert rates["images_per_second"] == pytest.approx(20.0)
    assert rates["seconds_left"] == pytest.approx(89 * 0.4)


def test_line_reads_as_documented():
    clock = Clock()
    progress = Progress(2000, 8, 4, steps_per_epoch=90, clock=clock)
    assert progress.line(0, {}) == "step 0/2000 (epoch 0.0)"
    run(progress, clock, range(1, 121))
    assert progress.line(120, {"loss": 1.23456}) == (
        "step 120/2000 (epoch 1.3)  loss 1.235  images/s 20.0 (5.0 per device)  data wait 25 %  "
        "left 0:12:32"
    )


def test_the_first_line_has_no_rates():
    clock = Clock()
    progress = Progress(10, 8, 1, clock=clock)
    run(progress, clock, range(1, 2))
    assert progress.line(1, {"loss": 2.0}) == "step 1/10  loss 2"


def test_memory_does_not_grow_with_the_length_of_the_run():
    clock = Clock()
    progress = Progress(10**6, 8, 1, window_seconds=10.0, clock=clock)
    run(progress, clock, range(1, 5001))
    assert len(progress._marks) < 50


def test_a_plain_loop_says_a_line_every_few_seconds():
    clock, lines = Clock(), []
    progress = Progress(1000, what="merge", say=lines.append, every_seconds=10.0, clock=clock)
    for done in range(100, 1001, 100):
        clock.now += 4.0
        progress.report(done, {"rows": 123456 * done, "mAP": 0.123456})
    progress.report(1000, last=True)
    assert lines == [
        "merge 300/1000  rows 37036800  mAP 0.1235  images/s 25.0  left 0:00:28",
        "merge 600/1000  rows 74073600  mAP 0.1235  images/s 25.0  left 0:00:16",
        "merge 900/1000  rows 111110400  mAP 0.1235  images/s 25.0  left 0:00:04",
        "merge 1000/1000  images/s 25.0  left 0:00:00",
    ]


def test_slow_work_is_counted_by_the_hour_and_an_unknown_total_has_no_time_left():
    clock, lines = Clock(), []
    progress = Progress(0, what="search", unit="trees", say=lines.append, clock=clock)
    for done in (1, 2):
        clock.now += 30.0
        progress.report(done)
    assert lines == ["search 1", "search 2  trees/hour 120"]


def test_the_share_of_the_peak_that_is_reached_is_said_where_it_is_known():
    clock = Clock()
    progress = Progress(100, 8, 4, clock=clock, peak_flops=1e12)
    for step in range(1, 4):
        clock.now += 0.5
        progress.step_done(step, 1e11)
        line = progress.line(step, {})
    assert progress.rates(3)["mfu"] == pytest.approx(0.2)
    assert "MFU 20.0 %" in line
