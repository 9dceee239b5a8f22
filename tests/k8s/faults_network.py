"""Faults beside the RayService: policies, Services, budgets, monitors, and the set of objects as a whole."""

from copy import deepcopy

from faults import drop, fault, group, object_of, one, spec
from manifests import of_kind, ray_service


@fault("flows", "flow-open")
def nothing_is_denied_by_default(documents: list[dict]):
    drop(documents, "NetworkPolicy", "default-deny")


@fault("flows", "flow-closed")
def names_cannot_be_looked_up(documents: list[dict]):
    drop(documents, "NetworkPolicy", "dns")


@fault("flows", "flow-closed")
def dns_is_allowed_over_tcp_only(documents: list[dict]):
    object_of(documents, "NetworkPolicy", "dns")["spec"]["egress"][0]["ports"] = [{"protocol": "TCP", "port": 53}]


@fault("flows", "flow-open")
def the_dashboard_is_open_to_all(documents: list[dict]):
    del object_of(documents, "NetworkPolicy", "operator")["spec"]["ingress"][0]["from"]


@fault("flows", "flow-open")
def the_operators_whole_namespace_reaches_the_head(documents: list[dict]):
    del object_of(documents, "NetworkPolicy", "operator")["spec"]["ingress"][0]["from"][0]["podSelector"]


@fault("flows", "flow-open")
def metrics_are_open_to_all(documents: list[dict]):
    object_of(documents, "NetworkPolicy", "prometheus")["spec"]["ingress"][0]["from"] = []


@fault("flows", "flow-open")
def clients_reach_expert_pods(documents: list[dict]):
    del object_of(documents, "NetworkPolicy", "gateway-ingress")["spec"]["podSelector"]["matchLabels"]["moe-role"]


@fault("flows", "flow-open")
def clients_reach_every_port_of_a_gateway(documents: list[dict]):
    del object_of(documents, "NetworkPolicy", "gateway-ingress")["spec"]["ingress"][0]["ports"]


@fault("flows", "flow-closed")
def grpc_is_forgotten(documents: list[dict]):
    del object_of(documents, "NetworkPolicy", "gateway-ingress")["spec"]["ingress"][0]["ports"][1]


@fault("flows", "flow-closed")
def our_pods_are_chosen_by_the_clusters_name(documents: list[dict]):
    policy = object_of(documents, "NetworkPolicy", "ray-internal")["spec"]
    policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"]["ray.io/cluster"] = "expertmesh-abcde"


@fault("flows", "flow-open")
def everybody_in_the_namespace_counts_as_ours(documents: list[dict]):
    object_of(documents, "NetworkPolicy", "ray-internal")["spec"]["ingress"][0]["from"][0]["podSelector"] = {}


@fault("flows", "flow-closed")
def the_autoscaler_does_not_reach_the_api_server(documents: list[dict]):
    drop(documents, "NetworkPolicy", "api-server")


@fault("flows", "flow-open")
def pods_reach_the_internet(documents: list[dict]):
    object_of(documents, "NetworkPolicy", "dns")["spec"]["egress"].append({"ports": [{"port": 443}]})


@fault("flows", "flow-open")
def ranges_of_ports_are_open_to_clients(documents: list[dict]):
    ports = object_of(documents, "NetworkPolicy", "gateway-ingress")["spec"]["ingress"][0]["ports"]
    ports[0] = {"protocol": "TCP", "port": 8000, "endPort": 32000}


@fault("flows", "wide-block")
def the_api_server_is_the_whole_internet(documents: list[dict]):
    block = object_of(documents, "NetworkPolicy", "api-server")["spec"]["egress"][0]["to"][0]["ipBlock"]
    block["cidr"] = "0.0.0.0/0"


@fault("flows", "flow-closed", "prod")
def the_head_does_not_reach_redis(documents: list[dict]):
    drop(documents, "NetworkPolicy", "redis")


@fault("schemas", "schema")
def a_field_of_a_policy_is_misspelt(documents: list[dict]):
    policy = object_of(documents, "NetworkPolicy", "operator")["spec"]
    policy["policyType"] = policy.pop("policyTypes")


@fault("schemas", "schema")
def a_field_of_a_budget_is_misspelt(documents: list[dict]):
    object_of(documents, "PodDisruptionBudget", "experts")["spec"]["minAvailabel"] = 1


@fault("schemas", "schema", "prod")
def a_field_of_a_monitor_is_misspelt(documents: list[dict]):
    of_kind(documents, "PodMonitor")[0]["spec"]["podMetricEndpoints"] = []


@fault("bounds", "bad-block")
def an_address_block_has_bits_of_a_host(documents: list[dict]):
    block = object_of(documents, "NetworkPolicy", "api-server")["spec"]["egress"][0]["to"][0]["ipBlock"]
    block["cidr"] = "192.0.2.1/24"


@fault("bounds", "port-range")
def a_services_port_is_none(documents: list[dict]):
    object_of(documents, "Service", "expertmesh")["spec"]["ports"][0]["port"] = 70000


@fault("bounds", "port-range")
def a_range_of_ports_ends_before_it_begins(documents: list[dict]):
    object_of(documents, "NetworkPolicy", "operator")["spec"]["ingress"][0]["ports"][0]["endPort"] = 80


@fault("bounds", "budget-form")
def a_budget_says_how_many_may_be_away(documents: list[dict]):
    budget = object_of(documents, "PodDisruptionBudget", "experts")["spec"]
    budget["maxUnavailable"] = 1


@fault("bounds", "budget-form")
def a_budget_is_a_percentage(documents: list[dict]):
    object_of(documents, "PodDisruptionBudget", "experts")["spec"]["minAvailable"] = "50%"


@fault("bounds", "budget-blocks")
def a_budget_allows_no_eviction(documents: list[dict]):
    least = group(documents, "experts")["minReplicas"]
    object_of(documents, "PodDisruptionBudget", "experts")["spec"]["minAvailable"] = least


@fault("bounds", "budget-on-head")
def the_head_has_a_budget(documents: list[dict]):
    object_of(documents, "PodDisruptionBudget", "experts")["spec"]["selector"]["matchLabels"]["moe-role"] = "head"


@fault("bounds", "budget-unhealthy")
def a_broken_pod_blocks_a_drain(documents: list[dict]):
    del object_of(documents, "PodDisruptionBudget", "experts")["spec"]["unhealthyPodEvictionPolicy"]


@fault("references", "budget-selector")
def a_budget_counts_all_groups_as_one(documents: list[dict]):
    del object_of(documents, "PodDisruptionBudget", "experts")["spec"]["selector"]["matchLabels"]["moe-role"]


@fault("references", "selects-nothing")
def a_policy_selects_nothing(documents: list[dict]):
    policy = object_of(documents, "NetworkPolicy", "operator")["spec"]
    policy["podSelector"]["matchLabels"]["moe-role"] = "heads"


@fault("references", "selects-nothing")
def the_service_selects_by_the_operators_label(documents: list[dict]):
    selector = object_of(documents, "Service", "expertmesh")["spec"]["selector"]
    selector["app.kubernetes.io/name"] = "expertmesh"


@fault("references", "no-service-port")
def the_service_sends_clients_to_experts(documents: list[dict]):
    object_of(documents, "Service", "expertmesh")["spec"]["selector"] = {"app.kubernetes.io/part-of": "expertmesh"}


@fault("references", "no-service-port")
def the_services_port_is_called_otherwise(documents: list[dict]):
    one(object_of(documents, "Service", "expertmesh")["spec"]["ports"], "grpc")["targetPort"] = "serve-grpc"


@fault("references", "grpc-protocol")
def nobody_says_that_grpc_is_http2(documents: list[dict]):
    del one(object_of(documents, "Service", "expertmesh")["spec"]["ports"], "grpc")["appProtocol"]


@fault("references", "no-monitor-port", "prod")
def a_monitor_scrapes_a_port_that_is_not_there(documents: list[dict]):
    of_kind(documents, "PodMonitor")[0]["spec"]["podMetricsEndpoints"][0]["port"] = "metric"


@fault("references", "selects-nothing", "prod")
def a_monitor_selects_nothing(documents: list[dict]):
    of_kind(documents, "PodMonitor")[0]["spec"]["selector"]["matchLabels"]["ray.io/cluster"] = "expertmesh"


@fault("references", "not-monitored", "prod")
def nobody_scrapes_the_head(documents: list[dict]):
    drop(documents, "PodMonitor", "expertmesh-head")


@fault("objects", "object-twice")
def an_object_is_there_twice(documents: list[dict]):
    documents.append(deepcopy(object_of(documents, "Service", "expertmesh")))


@fault("objects", "one-ray-service")
def there_is_a_second_ray_service(documents: list[dict]):
    other = deepcopy(ray_service(documents))
    other["metadata"]["name"] = "expertmesh-2"
    documents.append(other)


@fault("objects", "namespace")
def an_object_is_in_no_namespace(documents: list[dict]):
    del object_of(documents, "NetworkPolicy", "dns")["metadata"]["namespace"]


@fault("objects", "labels")
def an_object_has_no_labels(documents: list[dict]):
    del object_of(documents, "NetworkPolicy", "dns")["metadata"]["labels"]


@fault("objects", "object-name")
def an_objects_name_has_an_underscore(documents: list[dict]):
    object_of(documents, "NetworkPolicy", "dns")["metadata"]["name"] = "to_dns"


@fault("objects", "pod-security-level")
def the_namespace_only_warns(documents: list[dict]):
    labels = object_of(documents, "Namespace", "expertmesh")["metadata"]["labels"]
    labels["pod-security.kubernetes.io/enforce"] = "baseline"


@fault("objects", "pod-security-level")
def the_standard_moves_with_the_cluster(documents: list[dict]):
    labels = object_of(documents, "Namespace", "expertmesh")["metadata"]["labels"]
    labels["pod-security.kubernetes.io/enforce-version"] = "latest"


@fault("objects", "secret-in-render")
def a_secret_is_in_the_repository(documents: list[dict]):
    metadata = deepcopy(object_of(documents, "Service", "expertmesh")["metadata"])
    documents.append({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"keys": "a"}})


@fault("objects", "local-config")
def a_file_for_kustomize_is_applied(documents: list[dict]):
    metadata = object_of(documents, "Service", "expertmesh")["metadata"]
    metadata["annotations"] = {"config.kubernetes.io/local-config": "true"}


@fault("objects", "second-autoscaler")
def an_hpa_scales_a_ray_cluster(documents: list[dict]):
    target = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": "expertmesh"}
    metadata = deepcopy(object_of(documents, "Service", "expertmesh")["metadata"])
    hpa = {"scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 4}
    documents.append(
        {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": metadata, "spec": hpa}
    )


@fault("objects", "second-autoscaler")
def keda_scales_a_ray_cluster(documents: list[dict]):
    metadata = deepcopy(object_of(documents, "Service", "expertmesh")["metadata"])
    scaled = {"scaleTargetRef": {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": "expertmesh"}, "triggers": []}
    documents.append({"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": metadata, "spec": scaled})


@fault("drain", "deletion-too-soon")
def the_old_cluster_goes_before_its_streams(documents: list[dict]):
    spec(documents)["rayClusterDeletionDelaySeconds"] = 60


@fault("production", "no-budget", "prod")
def a_group_of_prod_has_no_budget(documents: list[dict]):
    drop(documents, "PodDisruptionBudget", "experts")


@fault("production", "not-watched", "prod")
def nobody_is_warned(documents: list[dict]):
    documents.remove(of_kind(documents, "PrometheusRule")[0])
