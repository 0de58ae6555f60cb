"""What a file must not get to do that somebody else has written."""

import os


class Malicious:
    """Whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Attribute:
    """Pickled as `getattr(owner, name)`, as Python 3.11 pickles a member of an enum."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)

    def __call__(self):
        """Only what can be called may be pickled as a function."""


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def by_getattr(kind, os_name, path):
    """Whoever unpickles it with the true getattr makes a file.

    Args:
        kind (type): A class that may be unpickled; its module has imported os.
        os_name (str): As what.
    """
    module = Attribute(Attribute(kind, "__init__"), "__globals__")
    return Call(Attribute(Call(Attribute(module, "get"), os_name), "system"), f"touch {path}")
