package kubernetes

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// Eighty pods on eight GPUs, which is all there is; half of them leave, unevenly; twenty come again. Everything that can be restarted is
// restarted in between.
func TestEightyPodsOnEightGPUs(t *testing.T) {
	l := newLab(t, "")
	n := l.addNode("node-1", 8)
	n.startArbiter()
	n.startPlugin()

	var counts []int
	for i := range 80 {
		before := counts
		counts = n.comes(fmt.Sprintf("pod-%02d", i))
		if slices.Max(counts)-slices.Min(counts) > 1 {
			t.Fatalf("pod %d of 80 came to a GPU that had more than another: %v, after %v", i+1, counts, before)
		}
	}
	l.running(80)
	n.haveWhatTheyWereGiven()

	t.Log("the kubelet, the plugin, the arbiter, the API server and etcd are killed and come back")
	was := n.processes()
	for _, step := range []struct {
		what    string
		restart func()
	}{
		{"kubelet", n.restartKubelet},
		{"plugin", n.restartPlugin},
		{"arbiter", n.restartArbiter},
		{"API server", l.restartAPIServer},
		{"etcd", l.restartEtcd},
	} {
		step.restart()
		l.running(80)
		if now := n.processes(); fmt.Sprint(now) != fmt.Sprint(was) {
			t.Fatalf("a restart of the %s disturbed containers:\n%v\nthey were\n%v", step.what, now, was)
		}
		if now, _ := n.held(); !slices.Equal(now, counts) {
			t.Fatalf("after a restart of the %s pods have %v, they had %v", step.what, now, counts)
		}
	}

	t.Log("forty leave, unevenly")
	leave := []int{10, 10, 8, 6, 4, 2, 0, 0}
	var gone []string
	_, byPod := n.held()
	for name, gpus := range byPod {
		if gpu := gpus[0]; leave[gpu] > 0 {
			leave[gpu]--
			gone = append(gone, name)
		}
	}
	l.delete(gone...)
	l.until("forty pods are gone", func() error {
		if counts, _ = n.held(); sum(counts) != 40 {
			return fmt.Errorf("pods have %v", counts)
		}
		return nil
	})
	if wanted := []int{0, 0, 2, 4, 6, 8, 10, 10}; !slices.Equal(counts, wanted) {
		t.Fatalf("after forty have left pods have %v and not %v", counts, wanted)
	}

	t.Log("twenty come, with restarts among them")
	between := map[int]func(){4: n.restartPlugin, 8: n.restartKubelet, 12: n.restartArbiter, 16: l.restartAPIServer}
	for i := range 20 {
		if restart := between[i]; restart != nil {
			restart()
		}
		before := counts
		counts = n.comes(fmt.Sprintf("new-%02d", i))
		for gpu := range counts {
			if counts[gpu] > before[gpu] && before[gpu] > slices.Min(before) {
				t.Fatalf("pod %d of 20 came to GPU %d, which was not the least loaded: %v, after %v", i+1, gpu, counts, before)
			}
		}
	}
	l.running(60)
	n.haveWhatTheyWereGiven()
}

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

func (n *gpuNode) restartPlugin() {
	n.lab.Helper()
	before := n.registrations()
	n.plugin.Kill()
	n.lab.must(n.plugin.Start())
	n.registered(before)
}

// registrations is how often the plugin has registered with the kubelet.
func (n *gpuNode) registrations() int {
	n.lab.Helper()
	text, err := os.ReadFile(n.plugin.Log)
	n.lab.must(err)
	return strings.Count(string(text), "registered with the kubelet")
}

// registered waits until the plugin has registered again, and the node offers what it has.
func (n *gpuNode) registered(before int) {
	n.lab.Helper()
	n.lab.until("the plugin registers again", func() error {
		if !n.plugin.Running() {
			n.lab.Fatalf("the plugin has ended: %s", n.plugin.Tail(10))
		}
		if n.registrations() == before {
			return fmt.Errorf("the plugin: %s", n.plugin.Tail(3))
		}
		if _, err := n.Devices(n.lab.ctx); err != nil {
			return err
		}
		return n.allocatable(int64(10 * len(n.uuids)))
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

func sum(numbers []int) int {
	total := 0
	for _, number := range numbers {
		total += number
	}
	return total
}

func TestAContainerThatAsksForSeveralGetsDifferentGPUs(t *testing.T) {
	l := newLab(t, "")
	n := l.addNode("node-1", 4)
	n.startArbiter()
	n.startPlugin()
	for count := 1; count <= 4; count++ {
		name := fmt.Sprintf("asks-for-%d", count)
		l.create(pod(name, int64(count), "sleep", "infinity"))
		l.until(name+" runs", func() error { return isRunning(l.get(name)) })
		_, byPod := n.held()
		gpus := byPod[name]
		slices.Sort(gpus)
		if len(slices.Compact(slices.Clone(gpus))) != count {
			t.Fatalf("%s got GPUs %v", name, gpus)
		}
	}
	n.haveWhatTheyWereGiven()
	// There are four GPUs: six of them can only be some of them twice.
	l.create(pod("asks-for-6", 6, "sleep", "infinity"))
	l.until("asks-for-6 runs", func() error { return isRunning(l.get("asks-for-6")) })
	_, byPod := n.held()
	gpus := byPod["asks-for-6"]
	slices.Sort(gpus)
	if len(gpus) != 6 || len(slices.Compact(slices.Clone(gpus))) != 4 {
		t.Fatalf("asks-for-6 got GPUs %v", gpus)
	}
}
