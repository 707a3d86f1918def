"""``python -m producer.cli``."""

from producer.cli.main import main

if __name__ == "__main__":
    main()
