"""Behind the command ``pocketrec``: verbs, flags from dataclasses, what is shown, and the demo."""
