"""A cluster played on one machine: what kubelets, controllers and cluster DNS do with manifests, in network namespaces.

    manifests   kubectl renders a kustomization; helm a chart
    pod         a kubelet's work for one pod: init containers, volumes, probes, restarts, preStop, SIGTERM, SIGKILL
    dns         the DNS of the cluster: a Service's name has the addresses of its pods, as they come and go
    cluster     Deployments, DaemonSets and Services: rollouts, lost machines

The containers are real processes: their own user, no capabilities, a read-only root, PID 1 of their own. Not played:
images (all containers see this machine's files), limits of CPU and memory, NetworkPolicies, schedulers, seccomp.
"""
