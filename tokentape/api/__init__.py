"""The REST API and the page: everything here asks the rooms below and holds no logic of its own."""
