package kubernetes

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// A job walks over its memory and checks at the end, to the last bit, that it has what it should.
// The devices are those that the container has, as the simulated driver counts.
func job(size string, options ...string) []string {
	return append([]string{"/bin/sh", "-c",
		`devices=$(set | sed -n 's/^SIMULATED_GPU_\([0-9]*\)=.*/\1/p' | sort -n | paste -sd,) &&
exec nvshare internal job --devices "$devices" --size "$@"`, "job", size}, options...)
}

// client is what `nvshare status` says of a client.
type client struct {
	GPU    string
	Pid    int
	Demand int64
}

// clients asks the node's arbiter.
func (n *gpuNode) clients() []client {
	n.lab.Helper()
	out, err := n.Run(n.lab.ctx, n.environment, filepath.Join(n.lab.built, "nvshare"), "status", "--json")
	n.lab.must(err)
	var status struct {
		GPUs []struct {
			UUID    string `json:"uuid"`
			Clients []struct {
				Pid    int   `json:"pid"`
				Demand int64 `json:"demand_bytes"`
			} `json:"clients"`
		} `json:"gpus"`
	}
	n.lab.must(json.Unmarshal([]byte(out), &status))
	var found []client
	for _, gpu := range status.GPUs {
		for _, c := range gpu.Clients {
			found = append(found, client{gpu.UUID, c.Pid, c.Demand})
		}
	}
	return found
}

// wants waits until the container of a pod is a client that needs at least so much of one GPU.
func (n *gpuNode) wants(name string, bytes int64) {
	n.lab.Helper()
	n.lab.until(fmt.Sprintf("%s is a client that needs %d B", name, bytes), func() error {
		pod := n.lab.get(name)
		if err := isRunning(pod); err != nil {
			if pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded {
				n.lab.Fatalf("%v: %s", err, n.logs(name))
			}
			return err
		}
		container, err := n.Container(n.lab.ctx, pod, "main")
		if err != nil {
			return err
		}
		for _, client := range n.clients() {
			if client.Pid == container.Pid && client.Demand >= bytes {
				return nil
			}
		}
		return fmt.Errorf("clients: %v", n.clients())
	})
}

// logs is what a pod's container has written, as `kubectl logs` shows it.
func (n *gpuNode) logs(name string) string {
	n.lab.Helper()
	text, err := n.lab.Client.CoreV1().Pods("default").GetLogs(name, &corev1.PodLogOptions{}).DoRaw(n.lab.ctx)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

const mib = 1 << 20

// Two pods each need most of one GPU: they take turns, and both come out right. A third is killed in the middle, and leaves nothing
// behind.
func TestPodsShareAGPU(t *testing.T) { onEach(t, podsShareAGPU) }

func podsShareAGPU(t *testing.T, by offer) {
	l := newLab(t, "")
	n := l.addNode("node-1", 1)
	n.startArbiter()
	n.start(by)

	l.create(pod("endless", 1, job("120MiB")...))
	n.wants("endless", 120*mib)
	l.create(pod("one", 1, job("120MiB", "--iterations=40")...))
	l.create(pod("two", 1, job("120MiB", "--iterations=40")...))
	for _, name := range []string{"one", "two"} {
		l.until(name+" has finished", func() error {
			pod := l.get(name)
			if pod.Status.Phase == corev1.PodFailed {
				t.Fatalf("%s: %s", name, n.logs(name))
			}
			if pod.Status.Phase != corev1.PodSucceeded {
				return fmt.Errorf("%s", pod.Status.Phase)
			}
			return nil
		})
	}
	endless, err := n.Container(l.ctx, l.get("endless"), "main")
	l.must(err)
	if clients := n.clients(); len(clients) != 1 || clients[0].Pid != endless.Pid || clients[0].GPU != n.uuids[0] {
		t.Fatalf("the job that goes on is process %d; clients: %v", endless.Pid, clients)
	}

	l.must(syscall.Kill(endless.Pid, syscall.SIGKILL))
	l.until("the kubelet notices", func() error {
		pod := l.get("endless")
		if pod.Status.Phase != corev1.PodFailed {
			return fmt.Errorf("%s", pod.Status.Phase)
		}
		if code := pod.Status.ContainerStatuses[0].State.Terminated.ExitCode; code != 128+9 {
			t.Fatalf("its container ended with %d", code)
		}
		return nil
	})
	l.until("the arbiter has given its memory back", func() error {
		if clients := n.clients(); len(clients) > 0 {
			return fmt.Errorf("%v", clients)
		}
		return nil
	})
	// All of the memory can be had again, and, from the device plugin, all ten virtual GPUs.
	all := int64(10)
	if by == dra {
		// A claim gets a GPU once.
		all = 1
	}
	l.create(pod("all", all, job("160MiB", "--iterations=2")...))
	l.until("a pod that needs everything has finished", func() error {
		pod := l.get("all")
		if pod.Status.Phase == corev1.PodFailed {
			t.Fatalf("%s %s: %s", pod.Status.Reason, pod.Status.Message, n.logs("all"))
		}
		if pod.Status.Phase != corev1.PodSucceeded {
			return fmt.Errorf("%s", pod.Status.Phase)
		}
		return nil
	})
}
