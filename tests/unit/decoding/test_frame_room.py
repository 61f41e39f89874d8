"""A loop of small calls does not map memory at any depth of the stack."""

import resource
import sys

import pytest

from ryzen_llm.decoding.frame_room import with_frame_room


def small(a: int = 0) -> int:
    return a


def loop() -> int:
    """Page faults of a thousand calls."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(1000):
        small()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def at_depth(depth: int, roomy: bool) -> int:
    if depth:
        return at_depth(depth - 1, roomy)
    return with_frame_room(loop)() if roomy else loop()


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_no_depth_of_the_stack_maps_memory_at_each_call() -> None:
    """Of 300 depths some end at a piece's edge, which is seen without the room."""
    assert max(at_depth(depth, roomy=False) for depth in range(300)) > 900
    assert max(at_depth(depth, roomy=True) for depth in range(300)) < 100


def test_the_function_is_the_same() -> None:
    @with_frame_room
    def named(a: int, *, b: int = 2) -> tuple[int, int]:
        """What it says."""
        return a, b

    assert (named(1), named(3, b=4)) == ((1, 2), (3, 4))
    assert (named.__name__, named.__doc__) == ("named", "What it says.")
    with pytest.raises(TypeError, match=r"named\(\) missing 1 required"):
        named()  # type: ignore[call-arg]
