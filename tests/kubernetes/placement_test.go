package kubernetes

import (
	"fmt"
	"slices"
	"testing"
)

// Eighty pods on eight GPUs, which is all there is; half of them leave, unevenly; twenty come again. Everything that can be restarted is
// restarted in between.
func TestEightyPodsOnEightGPUs(t *testing.T) { onEach(t, eightyPodsOnEightGPUs) }

func eightyPodsOnEightGPUs(t *testing.T, by offer) {
	l := newLab(t, "")
	n := l.addNode("node-1", 8)
	n.startArbiter()
	n.start(by)

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

	t.Logf("the kubelet, the %s, the arbiter, the API server and etcd are killed and come back", by)
	was := n.processes()
	for _, step := range []struct {
		what    string
		restart func()
	}{
		{"kubelet", n.restartKubelet},
		{string(by), n.restartOffer},
		{"arbiter", n.restartArbiter},
		{"API server", l.restartAPIServer},
		{"etcd", l.restartEtcd},
	} {
		step.restart()
		l.running(80)
		if now := n.processes(); fmt.Sprint(now) != fmt.Sprint(was) {
			t.Fatalf("a restart of the %s disturbed containers:\n%v\nthey were\n%v", step.what, now, was)
		}
		// A kubelet that has just started does not know all of its pods yet.
		l.until("pods have what they had before a restart of the "+step.what, func() error {
			if now, _ := n.held(); !slices.Equal(now, counts) {
				return fmt.Errorf("they have %v, they had %v", now, counts)
			}
			return nil
		})
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
	between := map[int]func(){4: n.restartOffer, 8: n.restartKubelet, 12: n.restartArbiter, 16: l.restartAPIServer}
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

// All eighty come at once: whatever anybody sees in between, no GPU has a second pod while another has none.
func TestEightyPodsAtOnce(t *testing.T) {
	onEach(t, func(t *testing.T, by offer) {
		l := newLab(t, "")
		n := l.addNode("node-1", 8)
		n.startArbiter()
		n.start(by)
		for i := range 80 {
			l.create(pod(fmt.Sprintf("pod-%02d", i), 1, "sleep", "infinity"))
		}
		l.until("all have a virtual GPU", func() error {
			counts, _ := n.held()
			if slices.Max(counts) > 1 && slices.Min(counts) == 0 {
				t.Fatalf("one GPU has several pods while another has none: %v", counts)
			}
			if sum(counts) < 80 {
				return fmt.Errorf("pods have %v", counts)
			}
			return nil
		})
		if counts, _ := n.held(); slices.Max(counts) != 10 || slices.Min(counts) != 10 {
			t.Fatalf("pods have %v", counts)
		}
		l.running(80)
	})
}

func TestAContainerThatAsksForSeveralGetsDifferentGPUs(t *testing.T) {
	onEach(t, func(t *testing.T, by offer) {
		l := newLab(t, "")
		n := l.addNode("node-1", 4)
		n.startArbiter()
		n.start(by)
		for count := 1; count <= 4; count++ {
			name := fmt.Sprintf("asks-for-%d", count)
			l.create(pod(name, int64(count), "sleep", "infinity"))
			l.until(name+" runs", func() error { return isRunning(l.get(name)) })
			if gpus := n.gpusOf(name); len(gpus) != count || len(slices.Compact(slices.Clone(gpus))) != count {
				t.Fatalf("%s got GPUs %v", name, gpus)
			}
		}
		n.haveWhatTheyWereGiven()
		// There are four GPUs: six of them can only be some of them twice.
		l.create(pod("asks-for-6", 6, "sleep", "infinity"))
		if by == dra {
			says(t, l.event("asks-for-6", "FailedScheduling"), "cannot allocate all claims")
			return
		}
		l.until("asks-for-6 runs", func() error { return isRunning(l.get("asks-for-6")) })
		if gpus := n.gpusOf("asks-for-6"); len(gpus) != 6 || len(slices.Compact(slices.Clone(gpus))) != 4 {
			t.Fatalf("asks-for-6 got GPUs %v", gpus)
		}
	})
}

// By number of pods the second GPU has more. By what they do the first is fuller.
func TestNewPodsGoWhereThereIsLeastToDo(t *testing.T) {
	onEach(t, func(t *testing.T, by offer) {
		l := newLab(t, "")
		n := l.addNode("node-1", 2)
		n.startArbiter()
		n.start(by)
		l.create(pod("large", 1, job("160MiB")...))
		n.wants("large", 160*mib)
		full := n.gpusOf("large")[0]
		if by == dra {
			// The device plugin looks when it is asked. The driver is not asked: it publishes what it has seen, every now and then.
			l.until("the other GPU is published before the full one", func() error {
				if first := n.published()[0]; first == full {
					return fmt.Errorf("GPU %d is the first", first)
				}
				return nil
			})
		}
		for i := range 3 {
			name := fmt.Sprintf("small-%d", i)
			l.create(pod(name, 1, "sleep", "infinity"))
			l.until(name+" runs", func() error { return isRunning(l.get(name)) })
			if gpu := n.gpusOf(name)[0]; gpu == full {
				_, byPod := n.held()
				t.Fatalf("%s came to GPU %d, where a client needs nearly all: pods have %v", name, gpu, byPod)
			}
		}
	})
}

func sum(numbers []int) int {
	total := 0
	for _, number := range numbers {
		total += number
	}
	return total
}
