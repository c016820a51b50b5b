"""A call of an engine in a process that was forked after the model was opened."""

import multiprocessing

import numpy as np

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import Engine
from tood_deploy.errors import ToodError


def _call(engine: Engine, answers: "multiprocessing.SimpleQueue[str]") -> None:
    image, size = synthetic_image(64, 64, 1)[None], np.array([[64, 64]], np.int32)
    try:
        answers.put(f"{engine.infer(image, size, 0.05, 0.6).num_dets[0]} objects")
    except ToodError as error:
        answers.put(str(error))


def in_a_fork(engine: Engine) -> str:
    """What a call answers in a process that was forked after the model was opened."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_call, args=(engine, answers))
    child.start()
    child.join(30)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the call waits for ever"
    return answers.get()
