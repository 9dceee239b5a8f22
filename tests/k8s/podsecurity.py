"""Kubernetes' Pod Security Standard "restricted", whole, on every pod that would be made.

A RayService is admitted whatever its templates say; it is its pods that a restricted namespace refuses.
"""

from collections.abc import Iterator

from expansion import Pod, pods
from manifests import Problem, listing, part

VOLUME_TYPES = frozenset(
    (
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    )
)
SAFE_SYSCTLS = frozenset(
    (
        *("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start"),
        *("net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports"),
        *("net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl"),
        *("net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"),
    )
)
SELINUX_TYPES = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
SECCOMP_TYPES = ("RuntimeDefault", "Localhost")


def check(documents: list[dict]) -> list[Problem]:
    return [
        Problem(rule, f"pod {pod.name}" + (f", container {name}" if name else ""), what)
        for pod in pods(documents)
        for rule, name, what in _violations(pod)
    ]


Violation = tuple[str, str, str]  # rule, container ("" for the pod), what


def _violations(pod: Pod) -> Iterator[Violation]:
    yield from _pod(pod.spec)
    security = part(pod.spec, "securityContext")
    for container in pod.containers:
        name, own = str(container.get("name")), part(container, "securityContext")
        for rule, what in (*_context(own), *_privileges(own), *_inherited(own, security), *_network(container)):
            yield rule, name, what


def _pod(spec: dict) -> Iterator[Violation]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield "host-namespace", "", f"{field} is set"
    for volume in listing(spec, "volumes"):
        for kind in set(volume) - {"name"} - VOLUME_TYPES:
            yield "volume-type", "", f"volume {volume.get('name')} is of type {kind}"
    security = part(spec, "securityContext")
    for sysctl in listing(security, "sysctls"):
        if sysctl.get("name") not in SAFE_SYSCTLS:
            yield "sysctl", "", f"{sysctl.get('name')} is not among the safe ones"
    for rule, what in _context(security):
        yield rule, "", what


def _context(security: dict) -> Iterator[tuple[str, str]]:
    """What neither the pod's nor a container's security context may say."""
    if security.get("runAsNonRoot") is False or security.get("runAsUser") == 0:
        yield "run-as-root", "the security context asks for root"
    seccomp = part(security, "seccompProfile").get("type")
    if seccomp is not None and seccomp not in SECCOMP_TYPES:
        yield "seccomp", f"the profile is {seccomp}"
    if part(security, "windowsOptions").get("hostProcess"):
        yield "host-process", "windowsOptions.hostProcess is set"
    if part(security, "appArmorProfile").get("type", "RuntimeDefault") not in SECCOMP_TYPES:
        yield "apparmor", "the AppArmor profile is Unconfined"
    selinux = part(security, "seLinuxOptions")
    if selinux.get("type", "") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        yield "selinux", f"seLinuxOptions are {selinux}"


def _inherited(own: dict, of_pod: dict) -> Iterator[tuple[str, str]]:
    """What a container must have, of its own or from its pod."""
    if own.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
        yield "run-as-root", "runAsNonRoot is not true"
    if not (part(own, "seccompProfile") or part(of_pod, "seccompProfile")):
        yield "seccomp", "no seccomp profile"


def _privileges(own: dict) -> Iterator[tuple[str, str]]:
    """What a container can only say itself."""
    if own.get("privileged"):
        yield "privileged", "privileged is true"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "escalation", "allowPrivilegeEscalation is not false"
    capabilities = part(own, "capabilities")
    if "ALL" not in (capabilities.get("drop") or []):
        yield "capabilities", "capabilities do not drop ALL"
    if set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield "capabilities", f"capabilities add {capabilities['add']}"
    if own.get("procMount", "Default") != "Default":
        yield "proc-mount", f"procMount is {own['procMount']}"


def _network(container: dict) -> Iterator[tuple[str, str]]:
    """Ports of the machine, and probes and hooks that go to another host."""
    for port in listing(container, "ports"):
        if port.get("hostPort"):
            yield "host-port", f"hostPort {port['hostPort']}"
    lifecycle = part(container, "lifecycle")
    probes = [part(container, f"{kind}Probe") for kind in ("liveness", "readiness", "startup")]
    for handler in (*probes, part(lifecycle, "preStop"), part(lifecycle, "postStart")):
        if part(handler, "httpGet").get("host") or part(handler, "tcpSocket").get("host"):
            yield "probe-host", "a probe or a hook names a host"
