"""The graph side: the primitive and its rules, which importing this registers."""

from jpyfunc._primitive import registration as registration
