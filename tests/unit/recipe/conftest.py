import pytest
import recipes


@pytest.fixture
def workshop(tmp_path):
    return recipes.Workshop(tmp_path)
