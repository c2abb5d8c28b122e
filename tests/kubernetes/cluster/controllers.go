package cluster

import (
	"context"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Those that the tests need: service accounts for pods, what a chart is made of, claims for devices, and whoever tidies up.
var controllers = []string{
	"serviceaccount-controller", "serviceaccount-token-controller", "root-ca-certificate-publisher-controller",
	"namespace-controller", "garbage-collector-controller", "pod-garbage-collector-controller",
	"daemonset-controller", "deployment-controller", "replicaset-controller", "job-controller",
	"node-lifecycle-controller", "taint-eviction-controller",
	"resourceclaim-controller", "device-taint-eviction-controller",
	"validatingadmissionpolicy-status-controller", "clusterrole-aggregation-controller",
}

func (c *Cluster) startControllers(ctx context.Context) error {
	kubeconfig, err := c.authority.client("controller-manager", "system:kube-controller-manager")
	if err != nil {
		return err
	}
	c.Controllers = c.component("kube-controller-manager",
		"--kubeconfig="+kubeconfig,
		"--authentication-kubeconfig="+kubeconfig,
		"--authorization-kubeconfig="+kubeconfig,
		"--bind-address="+controlPlane,
		"--controllers="+strings.Join(controllers, ","),
		"--root-ca-file="+c.authority.path("ca.crt"),
		"--service-account-private-key-file="+c.authority.path("service-accounts.key"),
		"--use-service-account-credentials=true",
		// There is one of it.
		"--leader-elect=false",
	)
	if err := c.Controllers.Start(); err != nil {
		return err
	}
	// The first thing that everybody needs from it. Pods are refused until then.
	return await(ctx, "the namespace default has its service account", c.Controllers, func(ctx context.Context) error {
		_, err := c.Client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}
