"""``python -m fresh_plugin``: answers the request of the conformance kit on standard input."""

from lswt_core.conformance.fresh_process import main

if __name__ == "__main__":
    main()
