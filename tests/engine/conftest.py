from conftest_engine import components, folders, run  # noqa: F401  fixtures
