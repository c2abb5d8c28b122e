package kubernetes

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

// comes creates a pod that asks for one virtual GPU and waits until the kubelet has given it one: what all pods have then, by GPU.
func (n *gpuNode) comes(name string) []int {
	n.lab.Helper()
	n.lab.create(pod(name, 1, "sleep", "infinity"))
	var counts []int
	n.lab.until(name+" has its virtual GPU", func() error {
		var byPod map[string][]int
		if counts, byPod = n.held(); len(byPod[name]) != 1 {
			pod := n.lab.get(name)
			if pod.Status.Phase == "Failed" {
				n.lab.Fatalf("%s was refused: %s: %s", name, pod.Status.Reason, pod.Status.Message)
			}
			return fmt.Errorf("%s has %v", name, byPod[name])
		}
		return nil
	})
	return counts
}

// haveWhatTheyWereGiven compares what the kubelet has given to pods with what their containers have: the GPUs' own CDI devices,
// and what makes a client of nvshare.
func (n *gpuNode) haveWhatTheyWereGiven() {
	n.lab.Helper()
	_, byPod := n.held()
	pods := n.lab.pods()
	for name, gpus := range byPod {
		container, err := n.Container(n.lab.ctx, pods[name], "main")
		n.lab.must(err)
		for number, uuid := range n.uuids {
			has := container.Env(fmt.Sprintf("SIMULATED_GPU_%d", number)) == uuid
			if given := slices.Contains(gpus, number); has != given {
				n.lab.Fatalf("%s was given GPUs %v, but its container's environment says of GPU %d: %t", name, gpus, number, has)
			}
		}
		// As the container sees them.
		for variable, path := range map[string]string{"LD_PRELOAD": container.Env("LD_PRELOAD"), "NVSHARE_RUNTIME_DIR": container.Env("NVSHARE_RUNTIME_DIR")} {
			if _, err := os.Stat(fmt.Sprintf("/proc/%d/root%s", container.Pid, path)); path == "" || err != nil {
				n.lab.Fatalf("%s: %s=%q leads nowhere in its container: %v", name, variable, path, err)
			}
		}
	}
}

// processes are the first processes of the running pods' containers.
func (n *gpuNode) processes() map[string]int {
	n.lab.Helper()
	found := make(map[string]int)
	for name, pod := range n.lab.pods() {
		container, err := n.Container(n.lab.ctx, pod, "main")
		n.lab.must(err)
		if found[name] = container.Pid; container.Pid == 0 {
			n.lab.Fatalf("the container of %s has ended", name)
		}
	}
	return found
}

func (n *gpuNode) restartKubelet() {
	n.lab.Helper()
	before := n.registrations()
	n.Kubelet.Kill()
	n.lab.must(n.Kubelet.Start())
	n.registered(before)
}

func (n *gpuNode) restartOffer() {
	n.lab.Helper()
	before := n.registrations()
	n.offered.Kill()
	n.lab.must(n.offered.Start())
	n.registered(before)
}

// registrations is how often it has registered with the kubelet.
func (n *gpuNode) registrations() int {
	n.lab.Helper()
	text, err := os.ReadFile(n.offered.Log)
	n.lab.must(err)
	return strings.Count(string(text), "registered with the kubelet")
}

// registered waits until it has registered again, and the node offers what it has.
func (n *gpuNode) registered(before int) {
	n.lab.Helper()
	n.lab.until("it registers again", func() error {
		if !n.offered.Running() {
			n.lab.Fatalf("it has ended: %s", n.offered.Tail(10))
		}
		if n.registrations() == before {
			return fmt.Errorf("its log: %s", n.offered.Tail(3))
		}
		if _, err := n.Devices(n.lab.ctx); err != nil {
			return err
		}
		return n.offers(len(n.uuids))
	})
}

func (n *gpuNode) restartArbiter() {
	n.lab.Helper()
	n.arbiter.Kill()
	n.lab.must(n.arbiter.Start())
	n.arbiterReady()
}

func (l *lab) restartAPIServer() {
	l.Helper()
	l.APIServer.Kill()
	l.must(l.APIServer.Start())
	l.must(l.APIServerReady(l.ctx))
}

func (l *lab) restartEtcd() {
	l.Helper()
	l.Etcd.Kill()
	l.must(l.Etcd.Start())
	l.must(l.APIServerReady(l.ctx))
}
