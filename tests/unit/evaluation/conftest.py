"""What the tests with lm-evaluation-harness start from; each imports what is slow to import."""

import make_megatron_checkpoint as maker
import pytest


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    from harness_cases import train_tokenizer

    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def exported(megatron_runs, tokenizer_file, tmp_path_factory):
    """The checkpoint as a Hugging Face folder."""
    from megatron_longrope.conversion.to_hf import write_hf_folder

    folder = tmp_path_factory.mktemp("exported") / "hf"
    config, run = maker.longrope_config(), megatron_runs["untied_gqa"].path
    write_hf_folder(run, folder, longrope_config=config, tokenizer=tokenizer_file)
    return folder


@pytest.fixture(scope="module")
def engine(megatron_runs):
    from megatron_longrope.engine import load_engine

    run, config = megatron_runs["untied_gqa"].path, maker.longrope_config()
    return load_engine(run, longrope_config=config, hf_parity=True, device="cpu")


@pytest.fixture(scope="module")
def data_sets_are_cached_in_the_test(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("data")))
        yield patch
