"""How a small file length stands in for a full disk: the write fails in the same place."""


def little_room(bytes_: int) -> str:
    """First lines of a script whose files may not become longer. Not `preexec_fn`, which forks all of the tests' memory."""
    return (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_}, resource.RLIM_INFINITY))\n"
    )
