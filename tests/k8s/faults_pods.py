"""Faults in the templates: pods that a restricted namespace refuses, or that fail where they run."""

from faults import cluster, container, drop, fault, group, object_of, one, pod, volume


@fault("podsecurity", "escalation")
def the_autoscaler_has_no_security_context(documents: list[dict]):
    del cluster(documents)["autoscalerOptions"]["securityContext"]


@fault("podsecurity", "capabilities")
def a_container_keeps_its_capabilities(documents: list[dict]):
    del container(documents, "experts")["securityContext"]["capabilities"]


@fault("podsecurity", "capabilities")
def a_container_adds_a_capability(documents: list[dict]):
    container(documents, "experts")["securityContext"]["capabilities"]["add"] = ["SYS_PTRACE"]


@fault("podsecurity", "run-as-root")
def pods_may_run_as_root(documents: list[dict]):
    del pod(documents, "attention")["securityContext"]["runAsNonRoot"]


@fault("podsecurity", "run-as-root")
def a_container_asks_for_user_zero(documents: list[dict]):
    container(documents, "attention")["securityContext"]["runAsUser"] = 0


@fault("podsecurity", "seccomp")
def a_pod_has_no_seccomp_profile(documents: list[dict]):
    del pod(documents, "gateway")["securityContext"]["seccompProfile"]


@fault("podsecurity", "privileged")
def a_container_is_privileged(documents: list[dict]):
    container(documents, "experts")["securityContext"]["privileged"] = True


@fault("podsecurity", "host-namespace")
def pods_use_the_machines_network(documents: list[dict]):
    pod(documents, "experts")["hostNetwork"] = True


@fault("podsecurity", "host-namespace")
def pods_share_the_machines_memory(documents: list[dict]):
    pod(documents, "attention")["hostIPC"] = True


@fault("podsecurity", "volume-type")
def shared_memory_is_a_folder_of_the_machine(documents: list[dict]):
    found = volume(documents, "attention", "dev-shm")
    del found["emptyDir"]
    found["hostPath"] = {"path": "/dev/shm"}


@fault("podsecurity", "host-port")
def a_container_takes_a_port_of_the_machine(documents: list[dict]):
    container(documents, "gateway")["ports"][0]["hostPort"] = 8000


@fault("podsecurity", "probe-host")
def a_probe_goes_to_another_host(documents: list[dict]):
    container(documents, "gateway")["readinessProbe"]["httpGet"]["host"] = "169.254.169.254"


@fault("podsecurity", "sysctl")
def a_pod_sets_an_unsafe_sysctl(documents: list[dict]):
    pod(documents, "experts")["securityContext"]["sysctls"] = [{"name": "net.core.somaxconn", "value": "4096"}]


@fault("podsecurity", "proc-mount")
def a_container_sees_all_of_proc(documents: list[dict]):
    container(documents, "experts")["securityContext"]["procMount"] = "Unmasked"


@fault("podsecurity", "apparmor")
def a_pod_has_no_apparmor_profile(documents: list[dict]):
    pod(documents, "experts")["securityContext"]["appArmorProfile"] = {"type": "Unconfined"}


@fault("podsecurity", "selinux")
def a_container_chooses_its_selinux_type(documents: list[dict]):
    container(documents, "experts")["securityContext"]["seLinuxOptions"] = {"type": "spc_t"}


@fault("podsecurity", "host-process")
def a_container_is_a_process_of_a_windows_host(documents: list[dict]):
    container(documents, "experts")["securityContext"]["windowsOptions"] = {"hostProcess": True}


@fault("hardening", "pod-non-root")
def only_the_container_says_that_it_is_not_root(documents: list[dict]):
    del pod(documents, "experts")["securityContext"]["runAsNonRoot"]
    container(documents, "experts")["securityContext"]["runAsNonRoot"] = True


@fault("hardening", "pod-seccomp")
def only_the_container_has_a_seccomp_profile(documents: list[dict]):
    profile = pod(documents, "experts")["securityContext"].pop("seccompProfile")
    container(documents, "experts")["securityContext"]["seccompProfile"] = profile


@fault("hardening", "numeric-user")
def the_user_is_left_to_the_image(documents: list[dict]):
    del pod(documents, "head")["securityContext"]["runAsUser"]


@fault("hardening", "service-links")
def every_service_becomes_variables(documents: list[dict]):
    del pod(documents, "head")["enableServiceLinks"]


@fault("hardening", "secret-mode")
def a_secret_is_readable_by_all(documents: list[dict]):
    volume(documents, "gateway", "api-keys")["secret"]["defaultMode"] = 0o444


@fault("hardening", "writable-root")
def the_autoscaler_can_write_to_its_image(documents: list[dict]):
    cluster(documents)["autoscalerOptions"]["securityContext"]["readOnlyRootFilesystem"] = False


@fault("hardening", "no-resources")
def a_container_has_no_limits(documents: list[dict]):
    del container(documents, "attention")["resources"]["limits"]


@fault("hardening", "secret-in-env")
def a_secret_is_written_into_a_variable(documents: list[dict]):
    container(documents, "gateway")["env"] += [{"name": "EXPERTMESH_API_KEYS", "value": "a-key-of-somebody"}]


@fault("hardening", "no-writable-place")
def ray_cannot_write_its_temporary_files(documents: list[dict]):
    mounts = container(documents, "experts")["volumeMounts"]
    mounts.remove(one(mounts, "tmp"))


@fault("hardening", "home")
def there_is_no_home(documents: list[dict]):
    environment = container(documents, "experts")["env"]
    environment.remove(one(environment, "HOME"))


@fault("bounds", "request-above-limit")
def a_request_is_above_its_limit(documents: list[dict]):
    container(documents, "experts")["resources"]["requests"]["memory"] = "900Gi"


@fault("bounds", "gpu-request", "v2")
def more_gpus_are_allowed_than_asked_for(documents: list[dict]):
    container(documents, "experts")["resources"]["requests"]["nvidia.com/gpu"] = 0


@fault("bounds", "no-quantity")
def a_size_is_in_gigabytes(documents: list[dict]):
    container(documents, "experts")["resources"]["limits"]["memory"] = "4GB"


@fault("bounds", "memory-volume")
def shared_memory_is_larger_than_the_memory(documents: list[dict]):
    volume(documents, "attention", "dev-shm")["emptyDir"]["sizeLimit"] = "900Gi"


@fault("bounds", "memory-volume")
def shared_memory_is_left_to_the_operator(documents: list[dict]):
    mounts = container(documents, "attention")["volumeMounts"]
    mounts.remove(one(mounts, "dev-shm"))
    pod(documents, "attention")["volumes"].remove(volume(documents, "attention", "dev-shm"))


@fault("bounds", "object-store")
def rays_object_store_is_larger_than_shared_memory(documents: list[dict]):
    group(documents, "attention")["rayStartParams"]["object-store-memory"] = str(512 << 30)


@fault("bounds", "object-store")
def rays_object_store_takes_its_own_share_of_the_memory(documents: list[dict]):
    del group(documents, "attention")["rayStartParams"]["object-store-memory"]


@fault("bounds", "port-name")
def a_ports_name_has_sixteen_characters(documents: list[dict]):
    one(container(documents, "experts")["ports"], "em-metrics")["name"] = "expertmesh-meter"


@fault("bounds", "port-range")
def a_containers_port_is_none(documents: list[dict]):
    one(container(documents, "experts")["ports"], "em-metrics")["containerPort"] = 94640


@fault("references", "no-account")
def a_service_account_is_misspelt(documents: list[dict]):
    pod(documents, "experts")["serviceAccountName"] = "expertmesh-workers"


@fault("references", "account-token")
def the_autoscaler_gets_no_token(documents: list[dict]):
    pod(documents, "head").pop("automountServiceAccountToken", None)
    object_of(documents, "ServiceAccount", "expertmesh-head")["automountServiceAccountToken"] = False


@fault("references", "account-token")
def a_worker_gets_a_token(documents: list[dict]):
    pod(documents, "experts")["automountServiceAccountToken"] = True


@fault("references", "no-volume-source")
def a_secret_is_misspelt(documents: list[dict]):
    volume(documents, "gateway", "api-keys")["secret"]["secretName"] = "expertmesh-keys"


@fault("references", "no-secret-key")
def a_key_of_a_secret_is_misspelt(documents: list[dict]):
    volume(documents, "gateway", "api-keys")["secret"]["items"] = [{"key": "key", "path": "keys"}]


@fault("references", "no-token-secret")
def the_secret_of_the_token_is_misspelt(documents: list[dict]):
    cluster(documents)["authOptions"]["secretName"] = "expertmesh-token"


@fault("references", "no-volume")
def a_mount_is_of_no_volume(documents: list[dict]):
    one(container(documents, "experts")["volumeMounts"], "run")["name"] = "runtime"


@fault("references", "no-probe-port")
def a_probe_asks_a_port_that_is_not_there(documents: list[dict]):
    container(documents, "gateway")["readinessProbe"]["httpGet"]["port"] = "serve"


@fault("references", "named-twice")
def a_variable_is_there_twice(documents: list[dict]):
    environment = container(documents, "experts")["env"]
    container(documents, "experts")["env"] = [*environment, dict(one(environment, "HOME"), value="/root")]


@fault("references", "no-account")
def the_heads_account_is_forgotten(documents: list[dict]):
    drop(documents, "ServiceAccount", "expertmesh-head")


@fault("objects", "pod-labels")
def a_template_lacks_our_labels(documents: list[dict]):
    del group(documents, "experts")["template"]["metadata"]["labels"]["app.kubernetes.io/part-of"]


@fault("drain", "grace-too-short")
def kubernetes_kills_before_streams_have_ended(documents: list[dict]):
    pod(documents, "attention")["terminationGracePeriodSeconds"] = 30


@fault("drain", "no-pre-stop")
def nobody_hears_that_a_pod_goes(documents: list[dict]):
    del container(documents, "attention")["lifecycle"]


@fault("drain", "hook-too-long", "v2")
def the_hook_waits_longer_than_the_pod_may(documents: list[dict]):
    container(documents, "attention")["lifecycle"]["preStop"]["exec"]["command"][-1] = "9000"


@fault("drain", "hook-too-short", "v2")
def the_hook_does_not_wait_for_streams(documents: list[dict]):
    container(documents, "attention")["lifecycle"]["preStop"]["exec"]["command"][-1] = "5"


@fault("drain", "no-hook", "v2")
def the_hook_is_a_program_that_is_not_there(documents: list[dict]):
    container(documents, "attention")["lifecycle"]["preStop"]["exec"]["command"][2] = "deploy.drain_node"


@fault("production", "not-spread", "prod")
def all_gateways_may_be_on_one_machine(documents: list[dict]):
    pod(documents, "gateway").pop("topologySpreadConstraints", None)
    pod(documents, "gateway").pop("affinity", None)
