"""One computation at a time, in order, and none that nobody wants."""

import threading
import time
import types

import pytest

from osv_jax.errors import UserError
from osv_jax.web import jobs as module
from osv_jax.web.jobs import Cancelled, Job, Jobs

SECONDS = 60


@pytest.fixture
def jobs():
    made = Jobs(most=2)
    yield made
    made.close(SECONDS)
    assert not made._thread.is_alive()


class Held:
    """A job that runs until it is let go of, or cancelled."""

    def __init__(self, owner="", **options):
        self.go_on, self.begun = threading.Event(), threading.Event()
        self.job = Job(self._compute, owner, **options)

    def _compute(self, job):
        self.begun.set()
        while not self.go_on.wait(0.005):
            job.check()
        return self.job.owner


def test_jobs_run_one_after_the_other_in_order(jobs):
    held, order = Held("a"), []
    later = [Job(lambda job: order.append(job.owner), owner) for owner in ("b", "c")]
    for job in (held.job, *later):
        jobs.submit(job)
        assert held.begun.wait(SECONDS)
    assert [jobs.before(job) for job in (held.job, *later)] == [0, 1, 2] and jobs.current is held.job
    assert order == []
    held.go_on.set()
    assert later[1].over.wait(SECONDS)
    assert order == ["b", "c"] and held.job.result == "a" and held.job.error is None


def test_a_full_queue_says_so(jobs):
    held = Held("a")
    jobs.submit(held.job)
    assert held.begun.wait(SECONDS)
    for owner in ("b", "c"):
        jobs.submit(Job(lambda job: None, owner))
    with pytest.raises(UserError, match="The queue is full: 2 are waiting already; try again in a while"):
        jobs.submit(Job(lambda job: None, "d"))
    with pytest.raises(UserError, match="Your last video is still being made"):
        jobs.submit(Job(lambda job: None, "b"))
    jobs.cancel("b")
    jobs.submit(Job(lambda job: None, "b"))


def test_what_is_cancelled_ends_at_its_next_check_or_never_begins(jobs):
    held, waiting = Held("a"), Held("b")
    jobs.submit(held.job)
    jobs.submit(waiting.job)
    assert held.begun.wait(SECONDS)
    assert jobs.cancel("b") and waiting.job.over.is_set() and not waiting.begun.is_set()
    assert jobs.cancel("a") and held.job.over.wait(SECONDS)
    assert isinstance(held.job.error, Cancelled) and isinstance(waiting.job.error, Cancelled)
    assert not jobs.cancel("nobody")


def test_what_nobody_looks_at_is_cancelled(jobs, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    held, waiting = Held(patience=10), Held(patience=10)
    jobs.submit(held.job)
    jobs.submit(waiting.job)
    assert held.begun.wait(SECONDS)
    for _ in range(3):
        now[0] += 9
        held.job.watch()
    assert not held.job.over.wait(0.1)
    now[0] += 11
    assert held.job.over.wait(SECONDS) and isinstance(held.job.error, Cancelled)
    assert waiting.job.over.wait(SECONDS) and not waiting.begun.is_set()


def test_a_mistake_does_not_stop_the_next(jobs):
    def fail(job):
        raise UserError("wrong")

    failing, good = Job(fail), Job(lambda job: 3)
    jobs.submit(failing)
    jobs.submit(good)
    assert good.over.wait(SECONDS) and good.result == 3
    assert str(failing.error) == "wrong"


def test_many_people_come_leave_and_cancel_and_nobody_waits_for_ever():
    """Whoever comes is served, told that the queue is full, or gone: in the order in which they came."""
    jobs, begun, came, refused = Jobs(most=12), [], [], []

    def compute(job):
        begun.append(job)
        time.sleep(0.002)
        job.check()
        if job.owner.endswith("3"):
            raise UserError("wrong")
        return job.owner

    def look(job):
        end = time.monotonic() + SECONDS
        while not job.over.wait(0.002):
            job.watch()
            jobs.before(job)
            assert time.monotonic() < end, job.owner

    people = []
    for number in range(60):
        leaves = number % 10 == 5
        job = Job(compute, str(number), patience=0.01 if leaves else SECONDS)
        try:
            jobs.submit(job)
        except UserError:
            refused.append(job)
            continue
        came.append(job)
        if number % 10 == 7:
            jobs.cancel(job.owner)
        if not leaves:
            people.append(threading.Thread(target=look, args=(job,)))
            people[-1].start()
        time.sleep(0.001)
    for person in people:
        person.join(SECONDS)
    assert all(job.over.wait(SECONDS) for job in came) and len(came) + len(refused) == 60
    assert begun == [job for job in came if job in begun]
    for job in came:
        number = int(job.owner) % 10
        if number == 3:
            assert str(job.error) == "wrong"
        elif number in (5, 7) and job.error is not None:
            assert isinstance(job.error, Cancelled)
        else:
            assert job.result == job.owner
    jobs.close(SECONDS)
    assert not jobs._thread.is_alive()
