from conftest_engine import components, finished, folders, run, trained  # noqa: F401  fixtures
