"""The tests; a package, so that no installed distribution with a folder of this name gets in between."""
