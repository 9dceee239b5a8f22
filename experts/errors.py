"""The errors of the whole product: one small tree, each with the sentence that the caller is shown."""


class ExpertmeshError(Exception):
    """Root of everything that we raise on purpose; the text is safe to show to a client."""


class ConfigError(ExpertmeshError):
    """A file, a flag or a checkpoint is not what it must be; says what to change. Raised before anything starts."""


class RequestError(ExpertmeshError):
    """The caller's input is wrong; `field` names what to change (INVALID_ARGUMENT, 400)."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross Ray's pickling; the keyword argument must survive it.
        return _rebuild_request_error, (str(self), self.field)


class ServingError(ExpertmeshError):
    """The input was right, and we could not answer; retriable."""


class GroupUnavailable(ServingError):
    """No live copy of an expert group, or no router, could be reached in time (UNAVAILABLE, 503)."""


class DeadlineExceeded(ServingError):
    """The request's own deadline passed (DEADLINE_EXCEEDED, 504)."""


class LinkError(ExpertmeshError):
    """A connection of the data plane broke; answered by a retry, never shown to a client."""


class FrameError(LinkError):
    """Bytes that are not a frame of our protocol, or exceed its limits; closes the link they came from."""


class HandshakeError(LinkError):
    """The peer failed the mutual authentication, or serves another model or protocol version."""


def _rebuild_request_error(message: str, field: str | None) -> RequestError:
    return RequestError(message, field=field)
