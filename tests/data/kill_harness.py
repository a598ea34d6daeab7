"""Prepares a dataset, killed again and again: `python kill_harness.py SOURCE OUTPUT KILLS SEED`.

Prints JSON: how many clips were committed at every kill, how many the killed attempt had encoded, and clips that were
encoded although they were committed.
Everything is imported once; each attempt is a fork. The networks are replaced by `fake_encoder`.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time

if __name__ == "__main__":
    import tensorflow_datasets  # noqa: F401
    from fake_encoder import FakeEncoder

    from osv_jax import prepare
    from osv_jax.data.latents import _features
    from osv_jax.preparation import pipeline, shards, stored
    from osv_jax.preparation.encoder import noise_key

ARGUMENTS = ["--num_frames=4", "--fps=10", "--height=24", "--width=32", "--batch_size=2", "--videos_per_file=3"]
ARGUMENTS += ["--num_augmented=2", "--workers=2", "--test_videos=2", "--min_motion=0"]


def attempt(source: str, output: pathlib.Path, log: pathlib.Path) -> int:
    """Starts preparing in a process of its own; every clip that it encodes goes to the log, as its noise key."""
    process = os.fork()
    if process:
        return process

    def write(keys):
        with log.open("a") as opened:
            opened.writelines(f"{key.tolist()}\n" for key in keys)

    pipeline._encoder = lambda *_: FakeEncoder(seconds=0.1, on_call=write)
    pipeline._networks = lambda *_: ("", {})
    pipeline._fingerprint = lambda *_: "fake"
    pipeline._draw_sheet = lambda *_: None
    prepare.main([f"--source={source}", f"--output={output}", *ARGUMENTS])
    os._exit(0)


def committed(output: pathlib.Path) -> set[str]:
    """The noise keys of the clips that are in files of their final names; found in a fork.

    Reading starts threads, and a process that has some cannot be forked any more.
    """
    result = output.with_suffix(".committed")
    process = os.fork()
    if not process:
        result.write_text(json.dumps(sorted(_committed(output))))
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    return set(json.loads(result.read_text()))


def _committed(output: pathlib.Path) -> set[str]:
    keys = set()
    for file in [*output.glob("unfinished/*/*.array_record"), *output.glob("unfinished/*.array_record")]:
        records = stored.read_records(file)
        records = records[1:] if file.parent.name != shards.UNFINISHED else records
        for record in records:
            parsed = _features(FakeEncoder().schema).deserialize_example_np(record)
            number = round(parsed["clip_start"] / 0.4)
            keys.add(str(noise_key(0, parsed["source"].decode(), number).tolist()))
    return keys


def main() -> None:
    source, output, kills, seed = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    log, rng = output.with_suffix(".log"), random.Random(seed)
    sys.stdout.flush()
    at_kill, encoded, redone = [], [], 0
    while len(at_kill) < kills:
        log.write_text("")
        before = committed(output)
        process = attempt(source, output, log)
        # The moments are counted in batches encoded, for on a slow machine most times would fall on the start.
        clips = 2 * rng.choice((1, 1, 2, 3))
        while len(log.read_text().splitlines()) < clips and os.waitpid(process, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), f"the attempt ended by itself, after {at_kill}"
        keys = log.read_text().splitlines()
        redone += len(before & set(keys))
        at_kill.append(len(committed(output)))
        encoded.append(len(keys))
    log.write_text("")
    before = committed(output)
    process = attempt(source, output, log)
    assert os.waitpid(process, 0)[1] == 0
    redone += len(before & set(log.read_text().splitlines()))
    print(json.dumps({"at_kill": at_kill, "encoded": encoded, "redone": redone}))


if __name__ == "__main__":
    main()
