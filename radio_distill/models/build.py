"""Makes the body that a recipe's student section describes."""

from ..config import StudentConfig
from .body import Body
from .student import Initialise, Student
from .timm_student import TimmStudent


def build_body(
    config: StudentConfig,
    num_summary_tokens: int,
    weight_noise: float = 0.0,
    initialise: Initialise | None = None,
) -> Body:
    """Build the body of a student; arguments and errors are those of :class:`.student.Student`."""
    if config.body == "timm":
        return TimmStudent(config, num_summary_tokens, initialise)
    return Student(config, num_summary_tokens, weight_noise, initialise)
