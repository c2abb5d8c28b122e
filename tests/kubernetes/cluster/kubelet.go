package cluster

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
)

// What this kind of machine needs is said; the rest is as usual.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: %[1]s
healthzBindAddress: %[1]s
containerRuntimeEndpoint: unix://%[2]s
podLogsDir: /var/log/pods
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: %[3]s}
authorization: {mode: Webhook}
# Test machines have control groups of the first version, which the kubelet refuses unless it is told not to.
failCgroupV1: false
# The kubelet makes no control groups of its own: on a machine that it shares it would have to reserve processors and memory there.
# Containers have theirs, with their limits, from the runtime.
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: [none]
failSwapOn: false
# The machine's disk and memory are not the node's own, so pods are not evicted when they fill up.
localStorageCapacityIsolation: false
evictionHard:
  memory.available: "0%%"
  nodefs.available: "0%%"
  imagefs.available: "0%%"
  nodefs.inodesFree: "0%%"
imageGCHighThresholdPercent: 100
# A pod whose claims could not be prepared is tried again only after this long. The API server refuses a node's first look at a claim if it has
# not yet seen that the claim's pod is bound there.
syncFrequency: 5s
# Labels and status reach the API server at once.
nodeStatusUpdateFrequency: 1s
nodeStatusReportFrequency: 5m
maxPods: 110
`

func (n *Node) startKubelet(ctx context.Context, labels map[string]string) error {
	// The node authorizer knows a node by this name and group.
	kubeconfig, err := n.cluster.authority.client(n.Name, "system:node:"+n.Name, "system:nodes")
	if err != nil {
		return err
	}
	config, err := n.cluster.write(n.Name+"/kubelet.yaml", fmt.Sprintf(kubeletConfig,
		n.Address, filepath.Join(n.Folder, "cri.sock"), n.cluster.authority.path("ca.crt")))
	if err != nil {
		return err
	}
	var pairs []string
	for key, value := range labels {
		pairs = append(pairs, key+"="+value)
	}
	n.Kubelet = newProcess(filepath.Join(n.cluster.Folder, "logs"), n.Name+"-kubelet", nil, n.enter([]string{
		n.cluster.Binary, "kubelet",
		"--config=" + config,
		"--kubeconfig=" + kubeconfig,
		"--hostname-override=" + n.Name,
		"--node-ip=" + n.Address,
		"--node-labels=" + strings.Join(pairs, ","),
		"--v=2",
	})...)
	if err := n.Kubelet.Start(); err != nil {
		return err
	}
	return n.KubeletReady(ctx)
}

// KubeletReady waits until the node takes pods.
func (n *Node) KubeletReady(ctx context.Context) error {
	return await(ctx, n.Name+" is ready", n.Kubelet, n.ready)
}
