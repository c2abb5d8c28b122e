package kubernetes

import (
	"fmt"
	"slices"
	"testing"
)

// Eighty pods on eight GPUs, which is all there is; then half of them leave.
func TestEightyPodsFillEightGPUsEvenly(t *testing.T) {
	l := newLab(t, "")
	n := l.addNode("node-1", 8)
	n.startArbiter()
	n.startPlugin()
	for i := range 8 {
		name := fmt.Sprintf("pod-%02d", i)
		l.create(pod(name, 1, "sleep", "infinity"))
		var counts []int
		l.until(name+" has its virtual GPU", func() error {
			var byPod map[string][]int
			if counts, byPod = n.held(); len(byPod[name]) != 1 {
				return fmt.Errorf("%s has %v: %s", name, byPod[name], l.get(name).Status.Message)
			}
			return nil
		})
		if slices.Max(counts)-slices.Min(counts) > 1 {
			t.Fatalf("pod %d came to a GPU that had more than another: %v", i+1, counts)
		}
	}
	l.running(8)
}
