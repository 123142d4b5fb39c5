"""Print docs/reference/fields.md: every field of a recipe, with its default and unit.

python -m tools.fields_page > docs/reference/fields.md
"""

import sys

from radio_distill.config import Recipe, describe_fields

from .published import markdown


def main() -> int:
    """Print the page."""
    print(
        "\n".join(markdown(("field", "default", "unit", "what it does"), describe_fields(Recipe)))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
