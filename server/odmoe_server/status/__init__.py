"""How the server is doing, for people: a page in the browser, a screen in the terminal, and the feed of both."""
