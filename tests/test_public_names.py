"""The names that users may rely on, and nothing more: CONTRIBUTING.md says what is stable."""
import timm_multiexit

NAMES = """
    AnytimeRunner EarlyExitRunner ExitConfig ExitCosts ExitPolicy InputError MultiExitNet MultiExitTask __version__
    exit_costs list_networks load_exit_config load_model
""".split()


def test_public_names():
    assert sorted(timm_multiexit.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(timm_multiexit, name) is not None
        assert name in dir(timm_multiexit)
