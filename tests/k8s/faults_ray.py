"""Faults in the RayService itself: what the operator refuses, ignores, or takes for something else."""

from faults import cluster, container, fault, group, pod, spec
from manifests import ray_service


@fault("schemas", "schema")
def a_field_of_the_ray_service_is_misspelt(documents: list[dict]):
    spec(documents)["rayClusterDeletionDelaySecond"] = 700


@fault("schemas", "schema")
def a_number_of_replicas_is_a_text(documents: list[dict]):
    group(documents, "experts")["maxReplicas"] = "3"


@fault("schemas", "schema")
def a_probe_in_a_template_is_misspelt(documents: list[dict]):
    container(documents, "gateway")["readinessProb"] = container(documents, "gateway").pop("readinessProbe")


@fault("schemas", "schema")
def a_field_of_the_core_is_misspelt_in_a_template(documents: list[dict]):
    pod(documents, "experts")["securityContext"]["runAsNonroot"] = True


@fault("schemas", "schema-unknown-kind")
def an_object_is_of_an_old_version(documents: list[dict]):
    ray_service(documents)["apiVersion"] = "ray.io/v1beta1"


@fault("kuberay_rules", "auth-mode")
def the_token_mode_is_left_to_its_default(documents: list[dict]):
    del cluster(documents)["authOptions"]["mode"]


@fault("kuberay_rules", "auth-secret")
def the_token_has_no_secret(documents: list[dict]):
    del cluster(documents)["authOptions"]["secretName"]


@fault("kuberay_rules", "auth-k8s")
def tokens_are_those_of_kubernetes(documents: list[dict]):
    cluster(documents)["authOptions"]["enableK8sTokenAuth"] = True


@fault("kuberay_rules", "auth-version")
def ray_is_too_old_for_tokens(documents: list[dict]):
    cluster(documents)["rayVersion"] = "2.51.1"


@fault("kuberay_rules", "service-name")
def the_name_is_too_long(documents: list[dict]):
    ray_service(documents)["metadata"]["name"] = "expertmesh-" + "x" * 40


@fault("kuberay_rules", "initializing-timeout")
def a_timeout_is_no_duration(documents: list[dict]):
    ray_service(documents)["metadata"].setdefault("annotations", {})["ray.io/initializing-timeout"] = "0s"


@fault("kuberay_rules", "upgrade-type")
def an_upgrade_is_incremental(documents: list[dict]):
    spec(documents)["upgradeStrategy"]["type"] = "NewClusterWithIncrementalUpgrade"


@fault("kuberay_rules", "cluster-upgrade")
def the_cluster_has_an_upgrade_strategy_too(documents: list[dict]):
    cluster(documents)["upgradeStrategy"] = {"type": "Recreate"}


@fault("kuberay_rules", "deletion-delay")
def the_deletion_delay_is_below_zero(documents: list[dict]):
    spec(documents)["rayClusterDeletionDelaySeconds"] = -1


@fault("kuberay_rules", "head-serves")
def the_head_is_behind_the_serve_service(documents: list[dict]):
    del spec(documents)["excludeHeadPodFromServeSvc"]


@fault("kuberay_rules", "alpha-field")
def policies_are_left_to_an_alpha_field(documents: list[dict]):
    cluster(documents)["networkPolicy"] = {"mode": "DenyAll"}


@fault("kuberay_rules", "head-service-name")
def the_heads_service_has_a_name(documents: list[dict]):
    group(documents, "head")["headService"] = {"metadata": {"name": "head"}}


@fault("kuberay_rules", "no-ray-version")
def the_version_of_ray_is_left_out(documents: list[dict]):
    del cluster(documents)["rayVersion"]


@fault("kuberay_rules", "no-autoscaling")
def the_autoscaler_is_off(documents: list[dict]):
    cluster(documents)["enableInTreeAutoscaling"] = False


@fault("kuberay_rules", "autoscaler-version")
def the_autoscalers_version_is_left_out(documents: list[dict]):
    del cluster(documents)["autoscalerOptions"]["version"]


@fault("kuberay_rules", "autoscaler-by-hand")
def the_autoscaler_is_chosen_by_a_variable(documents: list[dict]):
    container(documents, "head")["env"] += [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]


@fault("kuberay_rules", "idle-timeout")
def an_idle_timeout_is_below_zero(documents: list[dict]):
    group(documents, "experts")["idleTimeoutSeconds"] = -60


@fault("kuberay_rules", "restart-policy")
def pods_restart_under_autoscaler_v2(documents: list[dict]):
    pod(documents, "experts")["restartPolicy"] = "Always"


@fault("kuberay_rules", "ft-namespace", "prod")
def two_clusters_share_their_state_in_redis(documents: list[dict]):
    cluster(documents)["gcsFaultToleranceOptions"]["externalStorageNamespace"] = "expertmesh"


@fault("kuberay_rules", "ft-twice", "prod")
def fault_tolerance_is_asked_for_twice(documents: list[dict]):
    ray_service(documents)["metadata"].setdefault("annotations", {})["ray.io/ft-enabled"] = "true"


@fault("kuberay_rules", "ft-password", "prod")
def the_password_of_redis_is_written_out(documents: list[dict]):
    cluster(documents)["gcsFaultToleranceOptions"]["redisPassword"] = {"value": "hunter2"}


@fault("kuberay_rules", "redis-by-hand")
def redis_is_named_by_a_variable(documents: list[dict]):
    container(documents, "head")["env"] += [{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}]


@fault("kuberay_rules", "no-container")
def a_group_has_no_container(documents: list[dict]):
    pod(documents, "experts")["containers"] = []


@fault("kuberay_rules", "resources-twice")
def resources_are_said_twice(documents: list[dict]):
    group(documents, "experts")["resources"] = {"CPU": "4"}
    group(documents, "experts")["rayStartParams"]["num-cpus"] = "4"


@fault("kuberay_rules", "label-params")
def node_labels_are_start_parameters(documents: list[dict]):
    group(documents, "experts")["rayStartParams"]["labels"] = "moe-role=experts"


@fault("kuberay_rules", "params-text")
def a_start_parameter_is_a_number(documents: list[dict]):
    group(documents, "head")["rayStartParams"]["num-cpus"] = 0


@fault("kuberay_rules", "suspended")
def a_group_is_suspended(documents: list[dict]):
    group(documents, "experts")["suspend"] = True


@fault("kuberay_rules", "group-bounds")
def a_group_has_no_upper_bound(documents: list[dict]):
    del group(documents, "experts")["maxReplicas"]


@fault("kuberay_rules", "group-twice")
def two_groups_have_one_name(documents: list[dict]):
    group(documents, "experts")["groupName"] = "attention"


@fault("bounds", "group-min-above-max")
def a_groups_minimum_is_above_its_maximum(documents: list[dict]):
    group(documents, "experts")["minReplicas"] = group(documents, "experts")["maxReplicas"] + 1


@fault("bounds", "group-replicas")
def a_group_starts_outside_of_its_bounds(documents: list[dict]):
    group(documents, "experts")["replicas"] = group(documents, "experts")["maxReplicas"] + 1


@fault("bounds", "group-without-pods")
def a_group_may_have_no_pods(documents: list[dict]):
    group(documents, "experts")["minReplicas"] = 0


@fault("pins", "ray-version")
def the_version_of_ray_is_not_the_images(documents: list[dict]):
    cluster(documents)["rayVersion"] = "2.59.0"


@fault("pins", "two-images")
def one_group_has_another_image(documents: list[dict]):
    container(documents, "experts")["image"] = "expertmesh:0.1.1"


@fault("pins", "image-tag")
def an_image_has_no_version(documents: list[dict]):
    container(documents, "experts")["image"] = "expertmesh:latest"


@fault("production", "no-digest", "prod")
def an_image_of_prod_is_named_by_a_tag(documents: list[dict]):
    container(documents, "attention")["image"] = "registry.example.com/expertmesh:0.1.0"


@fault("production", "no-fault-tolerance", "prod")
def the_head_of_prod_forgets_everything(documents: list[dict]):
    del cluster(documents)["gcsFaultToleranceOptions"]


@fault("production", "no-upgrade", "prod")
def changes_of_prod_are_not_rolled_out(documents: list[dict]):
    spec(documents)["upgradeStrategy"]["type"] = "None"


@fault("production", "streams-cut", "prod")
def a_pod_of_prod_stops_ray_at_once(documents: list[dict]):
    container(documents, "attention")["lifecycle"]["preStop"] = {"exec": {"command": ["ray", "stop"]}}
