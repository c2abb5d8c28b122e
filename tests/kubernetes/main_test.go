// Package kubernetes tests nvshare's device plugin, DRA driver and Helm chart in a real cluster, with simulated GPUs.
package kubernetes

import (
	"fmt"
	"os"
	"testing"

	"nvshare.test/kubernetes/cluster"
)

func TestMain(m *testing.M) {
	if err := cluster.Enter(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}
