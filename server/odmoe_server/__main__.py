"""`python -m odmoe_server` is `odmoe`."""

from odmoe_server.cli import main

if __name__ == "__main__":
    main()
