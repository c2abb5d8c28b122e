package kubernetes

import (
	"fmt"
	"os"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// With the scheduler's configuration that is shipped, pods spread over nodes by their virtual GPUs, although one node has more processor
// to spare: by that alone the usual configuration would fill it first.
func TestPodsSpreadOverNodes(t *testing.T) {
	config, err := os.ReadFile(deploy + "/scheduler/kube-scheduler.yaml")
	if err != nil {
		t.Fatal(err)
	}
	l := newLab(t, setting("NVSHARE_TEST_SCHEDULER_CONFIG", string(config)))
	nodes := []*gpuNode{l.addNode("node-1", 2), l.addNode("node-2", 2)}
	for _, n := range nodes {
		n.startArbiter()
		n.start(devicePlugin)
	}
	busy := pod("busy", 0, "sleep", "infinity")
	busy.Spec.NodeName = "node-2"
	busy.Spec.Containers[0].Resources.Requests[corev1.ResourceCPU] = resource.MustParse("500m")
	l.create(busy)
	l.until("busy runs", func() error { return isRunning(l.get("busy")) })
	for i := range 16 {
		name := fmt.Sprintf("pod-%02d", i)
		l.create(pod(name, 1, "sleep", "infinity"))
		var have []int
		l.until(name+" has its virtual GPU", func() error {
			have = nil
			for _, n := range nodes {
				counts, _ := n.held()
				have = append(have, sum(counts))
			}
			if sum(have) != i+1 {
				return fmt.Errorf("nodes have %v", have)
			}
			return nil
		})
		if difference := have[0] - have[1]; difference < -1 || difference > 1 {
			t.Fatalf("of %d pods the nodes have %v", i+1, have)
		}
	}
	for _, n := range nodes {
		if counts, _ := n.held(); counts[0] != 4 || counts[1] != 4 {
			t.Fatalf("%s: its GPUs have %v", n.Name, counts)
		}
	}
}
