"""Faults in the Serve config: what Serve refuses, what it takes in silence, and what does not fit the pods."""

from faults import edit_config, edit_deployment, edit_serve, fault, group, one, spec


@fault("serve_rules", "serve-schema")
def serves_schema_refuses_a_value(documents: list[dict]):
    edit_deployment(documents, "gateway", lambda gateway: gateway.update(num_replicas=-1))


@fault("serve_rules", "serve-schema")
def the_serve_config_is_no_yaml(documents: list[dict]):
    spec(documents)["serveConfigV2"] = "applications: [\n"


@fault("serve_rules", "serve-unknown-key")
def a_key_of_a_deployment_is_misspelt(documents: list[dict]):
    edit_deployment(documents, "gateway", lambda gateway: gateway.update(num_replica=3))


@fault("serve_rules", "serve-unknown-key")
def a_key_of_the_actor_options_is_misspelt(documents: list[dict]):
    edit_deployment(documents, "gateway", lambda gateway: gateway["ray_actor_options"].update(labels_selector={}))


@fault("serve_rules", "serve-unknown-key")
def a_key_of_the_autoscaling_is_misspelt(documents: list[dict]):
    edit_deployment(documents, "experts-0", lambda experts: experts["autoscaling_config"].update(max_replica=3))


@fault("serve_rules", "serve-min-above-max")
def a_deployments_minimum_is_above_its_maximum(documents: list[dict]):
    edit_deployment(documents, "experts-0", lambda experts: experts["autoscaling_config"].update(min_replicas=99))


@fault("serve_rules", "serve-min-below-one")
def an_expert_group_may_have_no_copy(documents: list[dict]):
    edit_deployment(documents, "experts-0", lambda experts: experts["autoscaling_config"].update(min_replicas=0))


@fault("serve_rules", "serve-schema")
def a_deployment_has_a_size_and_bounds(documents: list[dict]):
    edit_deployment(documents, "experts-0", lambda experts: experts.update(num_replicas=1))


@fault("serve_rules", "serve-no-grace")
def a_deployments_grace_is_left_out(documents: list[dict]):
    edit_deployment(documents, "gateway", lambda gateway: gateway.pop("graceful_shutdown_timeout_s"))


@fault("serve_rules", "serve-no-selector")
def a_deployment_may_land_anywhere(documents: list[dict]):
    edit_deployment(documents, "router", lambda router: router["ray_actor_options"].pop("label_selector"))


@fault("serve_rules", "serve-selector-nowhere")
def a_label_is_one_that_no_group_has(documents: list[dict]):
    selector = {"moe-role": "expert"}
    edit_deployment(documents, "experts-0", lambda it: it["ray_actor_options"].update(label_selector=selector))


@fault("serve_rules", "serve-selector-nowhere")
def a_group_has_lost_its_node_labels(documents: list[dict]):
    del group(documents, "experts")["labels"]


@fault("serve_rules", "serve-import")
def the_application_does_not_import(documents: list[dict]):
    edit_serve(documents, lambda config: config["applications"][0].update(import_path="deploy.application:build"))


@fault("serve_rules", "serve-schema")
def a_policy_does_not_import(documents: list[dict]):
    policy = {"policy_function": "cluster.autoscale_policy:ExpertPolicy"}
    edit_deployment(documents, "experts-0", lambda it: it["autoscaling_config"].update(policy=policy))


@fault("serve_rules", "serve-policy")
def a_policy_needs_torch_in_serves_controller(documents: list[dict]):
    policy = {"policy_function": "experts.weights:bytes_needed"}
    edit_deployment(documents, "experts-0", lambda it: it["autoscaling_config"].update(policy=policy))


@fault("serve_rules", "serve-policy")
def a_policys_setting_is_misspelt(documents: list[dict]):
    edit_deployment(
        documents,
        "experts-0",
        lambda it: it["autoscaling_config"]["policy"]["policy_kwargs"].update(up_delay=30),
    )


@fault("serve_rules", "serve-proxies")
def serves_proxies_are_on(documents: list[dict]):
    edit_serve(documents, lambda config: config.update(proxy_location="EveryNode"))


@fault("serve_rules", "serve-applications")
def there_are_two_applications(documents: list[dict]):
    def add(config: dict) -> None:
        config["applications"].append({**config["applications"][0], "name": "other", "route_prefix": "/other"})

    edit_serve(documents, add)


@fault("wiring", "wrong-place")
def the_router_is_not_beside_the_engine(documents: list[dict]):
    selector = {"moe-role": "gateway"}
    edit_deployment(documents, "router", lambda it: it["ray_actor_options"].update(label_selector=selector))


@fault("wiring", "routers")
def an_attention_pod_may_have_no_router(documents: list[dict]):
    edit_deployment(documents, "attention", lambda attention: attention.update(num_replicas=2))


@fault("wiring", "not-alone")
def two_gateways_may_share_a_pod(documents: list[dict]):
    edit_deployment(documents, "gateway", lambda gateway: gateway.pop("max_replicas_per_node"))


@fault("wiring", "config")
def a_key_of_our_config_is_misspelt(documents: list[dict]):
    edit_config(documents, "router", dispatch_timeout=2.0)


@fault("wiring", "listens-inside")
def a_gateway_listens_on_loopback(documents: list[dict]):
    edit_config(documents, "gateway", grpc_host="127.0.0.1")


@fault("wiring", "no-keys")
def nobody_asks_for_a_key(documents: list[dict]):
    edit_config(documents, "gateway", auth="none", http_host="127.0.0.1", grpc_host="127.0.0.1")


@fault("wiring", "unix-between-pods")
def experts_listen_on_unix_sockets(documents: list[dict]):
    edit_config(documents, "experts", listen="unix")


@fault("wiring", "no-secret-file")
def the_keys_are_looked_for_elsewhere(documents: list[dict]):
    edit_config(documents, "gateway", keys_file="/etc/keys/keys")


@fault("wiring", "no-secret-file")
def the_secret_of_the_data_plane_is_not_mounted(documents: list[dict]):
    edit_serve(documents, lambda config: config["applications"][0]["args"].pop("secret_file"))


@fault("wiring", "secret-too-many")
def expert_pods_get_the_keys_of_clients(documents: list[dict]):
    volumes = group(documents, "experts")["template"]["spec"]["volumes"]
    volumes.append({"name": "api-keys", "secret": {"secretName": "expertmesh-api-keys"}})


@fault("wiring", "no-runtime-dir")
def the_runtime_folder_is_on_the_read_only_root(documents: list[dict]):
    edit_serve(documents, lambda config: config["applications"][0]["args"].update(runtime_dir="/var/run/expertmesh"))


@fault("wiring", "no-checkpoint", "v2")
def the_head_cannot_read_the_checkpoint(documents: list[dict]):
    mounts = group(documents, "head")["template"]["spec"]["containers"][0]["volumeMounts"]
    mounts.remove(one(mounts, "models"))


@fault("wiring", "wrong-port")
def metrics_are_on_another_port(documents: list[dict]):
    edit_config(documents, "metrics", port=9465)


@fault("wiring", "operator-probe")
def readiness_is_left_to_the_operator(documents: list[dict]):
    del group(documents, "experts")["template"]["spec"]["containers"][0]["readinessProbe"]


@fault("wiring", "gateway-readiness")
def a_gateway_is_ready_before_it_can_serve(documents: list[dict]):
    probe = group(documents, "gateway")["template"]["spec"]["containers"][0]["readinessProbe"]
    probe["httpGet"]["path"] = "/health"


@fault("wiring", "gateway-readiness", "prod")
def the_probe_speaks_in_clear_to_a_gateway_with_tls(documents: list[dict]):
    probe = group(documents, "gateway")["template"]["spec"]["containers"][0]["readinessProbe"]
    del probe["httpGet"]["scheme"]


@fault("wiring", "gateway-readiness", "prod")
def the_probe_has_no_certificate_for_mutual_tls(documents: list[dict]):
    edit_config(documents, "gateway", tls_client_ca_file="/etc/expertmesh/tls/ca.crt")


@fault("capacity", "replica-too-big")
def a_replica_fits_in_no_pod(documents: list[dict]):
    edit_deployment(documents, "attention", lambda attention: attention["ray_actor_options"].update(num_cpus=512))


@fault("capacity", "pod-shared")
def two_expert_groups_fit_into_one_pod(documents: list[dict]):
    for name in ("experts-0", "experts-1"):
        edit_deployment(documents, name, lambda experts: experts["ray_actor_options"].update(num_cpus=0.1))


@fault("capacity", "group-starts-too-small")
def copies_have_no_pods_to_start_in(documents: list[dict]):
    group(documents, "experts")["minReplicas"] = 1


@fault("capacity", "group-too-small")
def more_copies_are_allowed_than_pods(documents: list[dict]):
    edit_deployment(documents, "experts-0", lambda experts: experts["autoscaling_config"].update(max_replicas=50))


@fault("capacity", "no-room-to-replace")
def an_upgrade_has_no_spare_pod(documents: list[dict]):
    experts = group(documents, "experts")
    experts["maxReplicas"] = experts["minReplicas"]


@fault("capacity", "busy-head")
def the_head_takes_replicas(documents: list[dict]):
    del group(documents, "head")["rayStartParams"]["num-cpus"]


@fault("production", "only-one", "prod")
def an_expert_group_of_prod_has_one_copy(documents: list[dict]):
    edit_deployment(documents, "experts-7", lambda experts: experts["autoscaling_config"].update(min_replicas=1))


@fault("production", "no-tls", "prod")
def clients_of_prod_speak_in_clear(documents: list[dict]):
    edit_config(documents, "gateway", tls_cert_file=None)


@fault("production", "streams-cut", "prod")
def a_gateway_of_prod_ends_before_its_streams(documents: list[dict]):
    edit_deployment(documents, "gateway", lambda gateway: gateway.update(graceful_shutdown_timeout_s=30))
