import pytest

from tests.models.world import World, made_world


@pytest.fixture
def world() -> World:
    return made_world()
