package kubernetes

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	resourcev1 "k8s.io/api/resource/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// offer is a way in which a node's GPUs reach pods. Pods look the same with each: they ask for nvshare.com/gpu.
type offer string

const (
	devicePlugin offer = "device plugin"
	// The resource's name stands for a claim of a DeviceClass.
	dra offer = "DRA driver"

	driverName = "gpu.nvshare.com"
)

// onEach runs a test with each of them.
func onEach(t *testing.T, test func(*testing.T, offer)) {
	for _, by := range []offer{devicePlugin, dra} {
		t.Run(string(by), func(t *testing.T) { test(t, by) })
	}
}

// start starts the program that offers the node's GPUs, and waits until they can be had.
func (n *gpuNode) start(by offer, options ...string) {
	n.lab.Helper()
	n.by = by
	program := []string{filepath.Join(n.lab.built, "nvshare-kubernetes")}
	switch by {
	case devicePlugin:
		program = append(program, "device-plugin")
	case dra:
		n.lab.deviceClass()
		program = append(program, "dra-driver", "--node-name="+n.Name, "--kubeconfig="+n.lab.Kubeconfig)
	}
	program = append(append(program, "--gpu-cdi-kind="+simulatedKind), options...)
	n.offered = n.Program(strings.ReplaceAll(string(by), " ", "-"), n.environment, program...)
	n.lab.must(n.offered.Start())
	n.registered(0)
}

// deviceClass makes the class of nvshare's devices, unless there is one.
func (l *lab) deviceClass() {
	l.Helper()
	classes := l.Client.ResourceV1().DeviceClasses()
	if _, err := classes.Get(l.ctx, driverName, metav1.GetOptions{}); err == nil {
		return
	}
	name := resourceName
	_, err := classes.Create(l.ctx, &resourcev1.DeviceClass{
		ObjectMeta: metav1.ObjectMeta{Name: driverName},
		Spec: resourcev1.DeviceClassSpec{
			Selectors:            []resourcev1.DeviceSelector{{CEL: &resourcev1.CELDeviceSelector{Expression: fmt.Sprintf("device.driver == %q", driverName)}}},
			ExtendedResourceName: &name,
		},
	}, metav1.CreateOptions{})
	l.must(err)
}

// offers says whether so many of the node's GPUs can be had.
func (n *gpuNode) offers(gpus int) error {
	if n.by == devicePlugin {
		node, err := n.lab.Client.CoreV1().Nodes().Get(n.lab.ctx, n.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if quantity := node.Status.Allocatable[resourceName]; quantity.Value() != int64(10*gpus) {
			return fmt.Errorf("%s offers %d, not 10 for each of %d GPUs", n.Name, quantity.Value(), gpus)
		}
		return nil
	}
	slices, err := n.lab.Client.ResourceV1().ResourceSlices().List(n.lab.ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + n.Name})
	if err != nil {
		return err
	}
	good := 0
	for _, slice := range slices.Items {
		for _, device := range slice.Spec.Devices {
			if len(device.Taints) == 0 {
				good++
			}
		}
	}
	if good != gpus {
		return fmt.Errorf("%s publishes %d devices without a taint, not %d", n.Name, good, gpus)
	}
	return nil
}

// published are the node's GPUs in the order in which the DRA driver has published them.
func (n *gpuNode) published() []int {
	n.lab.Helper()
	slices, err := n.lab.Client.ResourceV1().ResourceSlices().List(n.lab.ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + n.Name})
	n.lab.must(err)
	if len(slices.Items) != 1 {
		n.lab.Fatalf("%s has %d ResourceSlices and not 1", n.Name, len(slices.Items))
	}
	var gpus []int
	for _, device := range slices.Items[0].Spec.Devices {
		gpus = append(gpus, n.number(device.Name))
	}
	return gpus
}

// held is how many virtual GPUs of each GPU pods have, by the GPUs' numbers, and which pod has which GPUs.
func (n *gpuNode) held() (counts []int, byPod map[string][]int) {
	n.lab.Helper()
	counts, byPod = make([]int, len(n.uuids)), make(map[string][]int)
	add := func(pod, uuid string) {
		number := n.number(uuid)
		counts[number]++
		byPod[pod] = append(byPod[pod], number)
	}
	if n.by == devicePlugin {
		devices, err := n.Devices(n.lab.ctx)
		n.lab.must(err)
		for pod, resources := range devices {
			for _, id := range resources[resourceName] {
				uuid, _, _ := strings.Cut(id, "::")
				add(strings.TrimPrefix(pod, "default/"), uuid)
			}
		}
		return counts, byPod
	}
	claims, err := n.lab.Client.ResourceV1().ResourceClaims("default").List(n.lab.ctx, metav1.ListOptions{})
	n.lab.must(err)
	for _, claim := range claims.Items {
		if claim.Status.Allocation == nil {
			continue
		}
		for _, result := range claim.Status.Allocation.Devices.Results {
			// The pool is the node's.
			if result.Driver != driverName || result.Pool != n.Name {
				continue
			}
			for _, user := range claim.Status.ReservedFor {
				add(user.Name, result.Device)
			}
		}
	}
	return counts, byPod
}

// gpusOf are the GPUs of a pod.
func (n *gpuNode) gpusOf(pod string) []int {
	n.lab.Helper()
	_, byPod := n.held()
	gpus := byPod[pod]
	slices.Sort(gpus)
	return gpus
}
